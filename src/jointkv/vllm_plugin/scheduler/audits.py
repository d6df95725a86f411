"""Audits: what reuse would have served to requests that were computed exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jointkv.core.evidence import Known
from jointkv.core.moved_text import UNWRITTEN
from jointkv.core.reuse import COMPUTED, Found, Integers
from jointkv.policy.reuse import Computed, ReuseRule, audited
from jointkv.vllm_plugin.scheduler.evidence import Audit, Compared
from jointkv.vllm_plugin.scheduler.licences import Licences, PageClass
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest
from jointkv.vllm_plugin.scheduler.residents import Residents


@dataclass(frozen=True)
class Record:
    """What an audit says of pages of one class.

    Attributes:
        adopted, missed: blocks that would have been reused, and those of them beyond the bounds.
    """

    page_class: PageClass
    adopted: int
    missed: int


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
        residents, seen, one = self._residents, tracked.standing(slot, slot + 1), np.array([page])
        if page >= UNWRITTEN:
            assert audit.text is not None
            if not audit.text.can_be_written(one)[0]:
                return
            source, exact, known = audit.text.source(page), False, audit.text.known(np.array([slot]), one)
        elif page not in residents:
            return
        else:
            source, exact = int(residents.source[page]), bool(residents.exact[page])
            known = residents.evidence.known(one, seen)
        ratio = ratio if ratio == ratio else math.inf
        page_class = PageClass(tracked.isolation, exact, moved=page >= UNWRITTEN)
        if page_class not in audit.licensed:
            audit.licensed[page_class] = self._licences.granted(page_class)
        evidence = int(known.count[0]), float(known.worst[0]), bool(known.new[0])
        audit.compared.append(Compared(slot, page, source, page_class, ratio, *evidence, residents.offers))

    def conclude_if_complete(self, tracked: TrackedRequest) -> None:
        """Once the prompt was looked at and all answers are there: records to the licences, ratios to the pages."""
        audit, end = tracked.audit, (tracked.request.num_prompt_tokens - 1) // tracked.block_size
        if audit is None or audit.outstanding or tracked.next_slot < end:
            return
        tracked.audit = None
        for record in records(audit, end, self._rule):
            self._licences.observe(record.page_class, record.missed, record.adopted)
        moved = [one for one in audit.compared if one.moved]
        if moved and audit.text is not None:
            slots, pages = np.array([(one.slot, one.page) for one in moved], np.int64).T
            there, ratios = audit.text.can_be_written(pages), np.array([one.ratio for one in moved], np.float32)
            audit.text.testify(slots[there], pages[there], ratios[there])
        still = [one for one in audit.compared if not one.moved]
        held = [one for one in still if self._residents.unchanged(np.array([one.page]), one.offers)[0]]
        self._residents.testify(
            tracked,
            np.array([one.slot for one in held], np.int64),
            np.array([one.page for one in held], np.int64),
            np.array([one.ratio for one in held], np.float32),
        )


def records(audit: Audit, end: int, rule: ReuseRule) -> Iterator[Record]:
    """What would have been reused of blocks before `end`, by the decisions that reuse makes: one of each class."""
    steps = _Imagined(audit.compared)
    licensed = [each for each in steps.classes if audit.licensed[each]]
    walk = steps.found, steps.classes, licensed, audit.chosen, 0, end, rule, steps, audit.by_entries
    for classes, plan in audited(*walk):
        slots = np.flatnonzero(plan.pages != COMPUTED)
        used = [steps.of[slot, page] for slot, page in zip(slots.tolist(), plan.pages[slots].tolist(), strict=True)]
        for each in classes:
            ratios = [one.ratio for one in used if one.page_class == each]
            if ratios:
                yield Record(each, len(ratios), sum(ratio > 1 for ratio in ratios))


class _Imagined(Computed):
    """Steps of an audit: everything is compared already."""

    def __init__(self, compared: list[Compared]) -> None:
        self.of = {(one.slot, one.page): one for one in compared}
        ordered = sorted(self.of.values(), key=lambda one: one.slot)
        slot, page, source = np.array([(one.slot, one.page, one.source) for one in ordered], np.int64).reshape(-1, 3).T
        self.found = Found(slot, page, source, np.array([one.page_class.exact for one in ordered], bool))
        of_class = [one.page_class for one in ordered]
        self.classes = {each: np.array([other == each for other in of_class], bool) for each in dict.fromkeys(of_class)}

    def ratios(self, slots: Integers, pages: Integers) -> NDArray[np.floating]:
        return np.array([one.ratio for one in self._at(slots, pages)])

    def known(self, slots: Integers, pages: Integers) -> Known:
        found = self._at(slots, pages)
        return Known(
            np.array([one.witnesses for one in found], np.int64),
            np.array([one.worst for one in found], np.float32),
            np.array([one.new for one in found], bool),
        )

    def _at(self, slots: Integers, pages: Integers) -> list[Compared]:
        return [self.of[one] for one in zip(slots.tolist(), pages.tolist(), strict=True)]
