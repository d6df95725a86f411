"""Text that requests read where it is resident, at another position: who does, and which pages are kept for them.

In the table of such a request the slots hold vLLM's null page, found by the request's private hashes, which nobody
answers for any more once it has started. The workers are told what it reads instead, and the pages that hold it are
kept by a reference each until the request ends or is preempted. Until it starts they are not: like every cached page
they may be handed out, and then their text is looked up anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from jointkv.core.moved import Fills
from jointkv.core.reuse import Integers
from jointkv.errors import IntegrityError
from jointkv.vllm_plugin.engine.pages import NULL_PAGE
from jointkv.vllm_plugin.engine.steps import started
from jointkv.vllm_plugin.engine.tables import BlockTables
from jointkv.vllm_plugin.messages import ReadInPlace
from jointkv.vllm_plugin.scheduler.intake import Intake


@dataclass(frozen=True, eq=False)
class _Reader:
    """A request that reads `fills` in place, from `pages`, as long as it is not preempted again."""

    request: Request
    preemptions: int
    fills: Fills
    pages: list[int]


class InPlace:
    """Keeps pages for those who read them in place.

    Args:
        tables: vLLM's.

    Attributes:
        possible: whether the workers say that they can.
    """

    def __init__(self, tables: BlockTables) -> None:
        self._tables = tables
        self.possible = False
        self._readers: dict[str, _Reader] = {}
        self._ready: dict[str, _Reader] = {}
        """Of the step that is being scheduled, until it is known who starts in it."""
        self._free: dict[int, bool] = {}
        """Pages that may be read by who starts in that step, and whether nobody held them before it was scheduled."""

    def takes(self, intake: Intake) -> bool:
        """Whether `intake` may read in place; a session that goes on comes with a table that is not looked up."""
        return self.possible and not intake.tracked.request.resumable

    def look(self, intakes: Iterable[Intake]) -> None:
        """The next step is about to be scheduled, in which some of `intakes` may start."""
        pages = {page for intake in intakes for page in intake.sources_in_place()}
        self._free = {page: not self._tables.is_held(page) for page in pages}

    def may_start(self, request: Request, computed: int, intake: Intake | None) -> bool:
        """Whether `request`, which would find `computed` tokens now, may start; then what it reads in place is kept.

        Args:
            intake: its own, or that of the request that it helps.
        """
        name = request.request_id
        self.end(name)
        slots = self._tables.without_page(request, computed)
        if not slots:
            return True
        if intake is None or not intake.in_place.keys() >= set(slots):
            self._tables.evict({NULL_PAGE})  # nobody knows what it would read there
            return False
        numbers = np.array([intake.in_place[slot] for slot in slots])
        fills = intake.text.fills(numbers)
        pages = _in_order(fills)
        fits = self._tables.always_fits(request, len(pages) - len(slots))  # else it might wait for its own sources
        if not (fits and self.takes(intake) and intake.text.can_be_written(numbers).all()):
            self.withdraw(intake)
            return False
        if any(map(self._is_taken, pages)):
            return False  # it is looked up anew before the next step
        self._tables.lend(pages)
        self._ready[name] = _Reader(request, request.num_preemptions, fills, pages)
        return True

    def start(self, output: SchedulerOutput) -> list[ReadInPlace]:
        """What those read in place who start in the step that `output` describes; the others give back their pages."""
        for name, reader in list(self._readers.items()):
            if reader.request.num_preemptions != reader.preemptions:
                self.end(name)
        reads = []
        for name, computed in started(output):
            if name in self._ready:
                reader = self._ready.pop(name)
                found = reader.fills.slots < computed // self._tables.groups[0].block_size
                self._readers[name] = replace(reader, fills=reader.fills.where(found))
                if found.any():
                    reads.append(ReadInPlace(name, self._readers[name].fills))
        for name in list(self._ready):
            self.end(name)
        self._free = {}
        return reads

    def end(self, request_id: str) -> None:
        """A request has ended, was preempted, or does not start after all."""
        for readers in (self._ready, self._readers):
            if request_id in readers:
                self._tables.take_back(readers.pop(request_id).pages)

    def let_go(self) -> None:
        """All requests that run are about to be preempted."""
        for name in [*self._readers, *self._ready]:
            self.end(name)

    def withdraw(self, intake: Intake) -> None:
        """`intake` computes what it was to read in place."""
        for slot in intake.in_place:
            self._tables.lead_nowhere(intake.tracked.request, slot)
        intake.compute_in_place()

    def check_integrity(self) -> None:
        """Raises IntegrityError when a table has slots without a page of which nothing is known, or pages are lost."""
        kept: Counter[int] = Counter()
        for reader in (*self._readers.values(), *self._ready.values()):
            kept.update(reader.pages)
        if kept != self._tables.lent:
            raise IntegrityError("pages are kept for nobody who reads in place, or not kept")
        if len(self._tables.groups) > 1:
            return  # nothing is reused, and windows and states give pages back while a request runs
        for name, slots in self._tables.all_without_page():
            if name not in self._readers or slots != self._readers[name].fills.slots.tolist():
                raise IntegrityError(f"{name} has no pages at slots {slots[:4]}, and nobody knows what it reads there")

    def _is_taken(self, page: int) -> bool:
        """Whether `page` may have been handed out since the step is being scheduled.

        One that was held before still is: vLLM starts nobody in a step in which it has preempted somebody.
        """
        free = self._free.get(page, True)
        return free and self._tables.is_held(page) and not self._tables.lent[page]


def _in_order(fills: Fills) -> list[int]:
    """The pages of `fills`, each once, those of the beginning first."""
    pages: Integers = np.stack((fills.first, fills.second), 1).ravel()
    return list(dict.fromkeys(pages.tolist()))
