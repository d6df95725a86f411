"""Audits: what reuse would have served to requests that were computed exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jointkv.core.reuse import COMPUTED, ReusePlan, Run, Runs
from jointkv.policy.reuse import ReuseRule
from jointkv.vllm_plugin.scheduler.evidence import Audit, Compared
from jointkv.vllm_plugin.scheduler.licences import Licences, RunClass
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest
from jointkv.vllm_plugin.scheduler.residents import Residents


@dataclass(frozen=True)
class Record:
    """What one run of an audit says.

    Attributes:
        first: its entry block's slot.
        adopted, missed: blocks that would have been reused, and those of them beyond the bounds.
        exact: see `RunClass`.
    """

    first: int
    adopted: int
    missed: int
    exact: bool


class Audits:
    """Collects the comparisons that fusion makes anyway, and draws the conclusion when a prompt is through.

    Args:
        rule: as reuse follows it.
        residents: learn from every comparison.
        licences: live by the records.
    """

    def __init__(self, rule: ReuseRule, residents: Residents, licences: Licences) -> None:
        self._rule, self._residents, self._licences = rule, residents, licences

    def note(self, audit: Audit, slot: int, page: int, ratio: float) -> None:
        """One pair has come back; witnesses are heard only when the audit is over."""
        residents = self._residents
        audit.compared.append(
            Compared(
                slot,
                page,
                int(residents.source[page]),
                bool(residents.exact[page]),
                float(ratio),
                int(residents.witnesses[page]),
                float(residents.worst[page]),
            )
        )

    def conclude_if_complete(self, tracked: TrackedRequest) -> None:
        """Once the prompt is computed and all answers are there: records to the licences, ratios to the pages."""
        audit, request = tracked.audit, tracked.request
        end = (request.num_prompt_tokens - 1) // tracked.block_size
        if audit is None or audit.outstanding or request.num_computed_tokens < end * tracked.block_size:
            return
        tracked.audit = None
        for record in records(audit.compared, end, self._rule):
            self._licences.observe(RunClass(tracked.isolation, record.exact), record.missed, record.adopted)
        for one in audit.compared:
            if self._residents.source[one.page] == one.source:
                self._residents.testify(one.page, one.ratio)


def records(compared: list[Compared], end: int, rule: ReuseRule) -> Iterator[Record]:
    """What would have been reused of blocks before `end`, run after run, by the decisions that reuse makes."""
    known = {(one.slot, one.page): one for one in compared}
    columns = [np.array([getattr(one, name) for one in compared], np.int64) for name in ("slot", "page", "source")]
    runs, at = Runs(*columns), 0
    while (entry := runs.next_entry(at, end, rule.least + 1)) is not None:
        sources = runs.through(entry, end, rule.least + 1, rule.sources)
        run = min(sources, key=lambda run: _or_infinite(known[entry, int(run.pages[0])].ratio))
        blocks = [known[slot, int(page)] for slot, page in enumerate(run.pages, entry)]
        plan = _adopted(run, blocks, rule)
        used = [block for block, page in zip(blocks, plan.pages[entry:], strict=True) if page != COMPUTED]
        if used:
            missed = sum(not block.ratio <= 1 for block in used)
            yield Record(entry, len(used), missed, all(block.exact for block in blocks[1:]))
        at = run.end


def _adopted(run: Run, blocks: list[Compared], rule: ReuseRule) -> ReusePlan:
    entry, *rest = blocks
    count, worst = np.array([one.witnesses for one in rest]), np.array([one.worst for one in rest], np.float32)
    behind = Run(run.first + 1, run.source, run.pages[1:])
    return ReusePlan.nothing(run.end).adopting(behind, rule.usable(entry.ratio, count, worst), rule.least)


def _or_infinite(ratio: float) -> float:
    return ratio if ratio == ratio else float("inf")
