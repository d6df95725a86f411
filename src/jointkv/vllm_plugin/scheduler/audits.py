"""Audits: what reuse would have served to requests that were computed exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jointkv.core.reuse import COMPUTED, Integers, Run, Runs
from jointkv.policy.reuse import Computed, ReuseRule, decide
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

    def note(self, tracked: TrackedRequest, audit: Audit, slot: int, page: int, ratio: float) -> None:
        """One pair has come back; witnesses are heard only when the audit is over."""
        residents, known = self._residents, self._residents.evidence
        if page not in residents:
            return
        seen = tracked.standing(slot, slot + 1)
        audit.compared.append(
            Compared(
                slot,
                page,
                int(residents.source[page]),
                bool(residents.exact[page]),
                ratio if ratio == ratio else math.inf,
                int(known.count[page]),
                float(known.worst[page]),
                bool(known.new(np.array([page]), seen)[0]),
                int(seen[0]),
            )
        )

    def conclude_if_complete(self, tracked: TrackedRequest) -> None:
        """Once the prompt was looked at and all answers are there: records to the licences, ratios to the pages."""
        audit, end = tracked.audit, (tracked.request.num_prompt_tokens - 1) // tracked.block_size
        if audit is None or audit.outstanding or tracked.next_slot < end:
            return
        tracked.audit = None
        for record in records(audit.compared, end, self._rule):
            self._licences.observe(RunClass(tracked.isolation, record.exact), record.missed, record.adopted)
        held = [one for one in audit.compared if self._residents.source[one.page] == one.source]
        self._residents.testify(
            np.array([one.page for one in held], np.int64),
            np.array([one.ratio for one in held], np.float32),
            np.array([one.seen for one in held], np.uint64),
        )


def records(compared: list[Compared], end: int, rule: ReuseRule) -> Iterator[Record]:
    """What would have been reused of blocks before `end`, run after run, by the decisions that reuse makes."""
    steps = _Imagined(compared, rule)
    columns = [np.array([getattr(one, name) for one in compared], np.int64) for name in ("slot", "page", "source")]
    decided = decide(Runs(*columns), 0, end, rule, steps)
    for run in decided.runs:
        pages = decided.plan.pages[run.start : run.stop].tolist()
        used = [steps.known[slot, page] for slot, page in zip(run, pages, strict=True) if page != COMPUTED]
        missed = sum(one.ratio > 1 for one in used)
        yield Record(run.start - 1, len(used), missed, all(one.exact for one in used))


class _Imagined(Computed):
    """Steps of an audit: everything is compared already."""

    def __init__(self, compared: list[Compared], rule: ReuseRule) -> None:
        self.known = {(one.slot, one.page): one for one in compared}
        self._rule = rule

    def ratios(self, slots: Integers, pages: Integers) -> NDArray[np.floating]:
        return np.array([self.known[one].ratio for one in zip(slots.tolist(), pages.tolist(), strict=True)])

    def usable(self, run: Run, entry: float) -> NDArray[np.bool_]:
        blocks = [self.known[slot, page] for slot, page in enumerate(run.pages.tolist(), run.first)]
        count, worst = np.array([one.witnesses for one in blocks]), np.array([one.worst for one in blocks], np.float32)
        return self._rule.usable(entry, count, worst, np.array([one.new for one in blocks], bool))
