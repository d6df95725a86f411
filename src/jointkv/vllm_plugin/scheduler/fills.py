"""Pages that are written with text from other positions: where they come from, who reads them, and when.

A page is taken from the pool as any other and goes back to its end at once, found by nothing but private hashes: like
every cached page it may be handed out again, and then its block is computed. The workers write it before the step that
follows; no request starts that would read it before they have said so. Sources are read before anything of that step is
written, and fills are carried out in the order in which they were planned here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from jointkv.core.moved_text import unwritten
from jointkv.core.reuse import COMPUTED, Integers, stretches
from jointkv.errors import IntegrityError
from jointkv.vllm_plugin.engine.pages import NULL_PAGE
from jointkv.vllm_plugin.messages import PageFill
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.in_place import InPlace
from jointkv.vllm_plugin.scheduler.intake import Intake
from jointkv.vllm_plugin.scheduler.look_up import GROUP
from jointkv.vllm_plugin.scheduler.questions import Answer, Question
from jointkv.vllm_plugin.scheduler.residents import Residents
from jointkv.vllm_plugin.scheduler.sharing import Sharing

Content = tuple[int, int, int]
"""Of a filled page: the request that has computed it, the slot where it is read, and by how much it has moved."""


class Room:
    """Free pages besides those that requests which have begun will take.

    Attributes:
        pages: how many.
        sources: pages counted among theirs that others read in place as well.
    """

    def __init__(self, pages: int) -> None:
        self.pages, self.sources = pages, set[int]()


class Fills:
    """Has pages written, or read where they are.

    Args:
        sharing: carries out.
        residents: what there is; a page leaves it before it is written.
        statistics: counts.

    Attributes:
        in_place: who reads text where it is, and may.
        sent: pages that the workers write before the step.
        unconfirmed: pages of which the workers have not said yet that they are written, and when they were told to, by
            a number; 0 for those that are still to be sent.
    """

    def __init__(self, sharing: Sharing, residents: Residents, statistics: Statistics) -> None:
        self._sharing, self._tables, self._residents = sharing, sharing.tables, residents
        self._statistics = statistics
        self.in_place = InPlace(self._tables)
        self.unconfirmed: dict[int, int] = {}
        self._planned: list[PageFill] = []
        self.sent: list[int] = []
        self._number = 0
        self._page_of: dict[Content, int] = {}
        self._content_of: dict[int, Content] = {}
        self._source_of: dict[int, int] = {}

    def place(self, intake: Intake, others: Iterable[Intake]) -> None:
        """Have the pages written that the plan of `intake` reads and that are not yet, and lead the request to them.

        Where workers can read text in place nothing is written, and nothing taken from the pool.
        Those that are written for a request with the same shift are read by this one as well. What has lost its sources
        is computed. Where the pool has too few free pages for the request nothing is done, and it is `short`; where it
        has too few besides those for others that are about to start, it waits for them.

        Args:
            others: requests that wait to start.
        """
        self._lead_to_equal(intake)
        slots, intake.short = self._still_to_write(intake), False
        if not len(slots):
            return
        if self.in_place.takes(intake):
            intake.read_in_place(slots)
            self._lead(intake, slots)
            self._tables.renew(sorted(intake.sources_in_place()))
            return
        own, free = self._found(intake), self._tables.free
        needed = self._tables.needed(intake.tracked.request, own)
        before = [other for other in others if other is not intake and other.covered and not other.helpers]
        promised = sum(other.needs_pages for other in before)
        intake.short = needed > free
        if needed + promised > free:
            return
        keep = own.union(*map(self._found, before))
        if self._write(intake, slots, keep) or (not promised and self._write(intake, slots, own)):
            intake.needs_pages = needed
        elif not promised:
            self._replace(intake, slots, np.full(len(slots), COMPUTED))

    def needed(self, intake: Intake, room: Room | None = None) -> int:
        """Free pages that it takes to start `intake`, if all that is undecided is reused where it stands.

        Args:
            room: whose sources are counted already.
        """
        needed = self._tables.needed(intake.tracked.request, {*self._found(intake), *intake.text.standing.tolist()})
        in_place, sources = self._in_place(intake)
        return needed - in_place + len(sources - (set() if room is None else room.sources))

    def room(self, intakes: Iterable[Intake]) -> Room:
        """What is left besides those that `intakes` which have begun will take."""
        room = Room(self._tables.free)
        for intake in intakes:
            if intake.begun:
                self.take_room(intake, room)
        return room

    def take_room(self, intake: Intake, room: Room) -> bool:
        """`intake` will take its part of `room`, also where that is too little: whether it is enough."""
        if room.pages > 0:
            room.pages -= self.needed(intake, room)
            room.sources |= self._in_place(intake)[1]
            return room.pages >= 0
        return False

    def lost(self, intake: Intake) -> bool:
        """Whether sources are gone that the plan of `intake` needs still; others may have become resident."""
        pages = intake.plan.pages[unwritten(intake.plan.pages)]
        pages = np.concatenate((pages, np.array(list(intake.in_place.values()), np.int64)))
        return bool(len(pages)) and not intake.text.can_be_written(pages).all()

    def kept(self, intake: Intake) -> list[int]:
        """Pages that `intake` will find or read in place: handed out last, and the first of them last of all.

        Behind a gap it finds none yet, and its own helper would take them.
        """
        pages = intake.plan.pages
        planned = pages[~unwritten(pages) & (pages != COMPUTED)].tolist()
        in_order = (*self._tables.found_pages(intake.tracked.request), *planned, *sorted(intake.sources_in_place()))
        return [page for page in dict.fromkeys(in_order) if page != NULL_PAGE]

    def awaits(self, intake: Intake) -> bool:
        """Whether pages that `intake` is to read are still to be written."""
        pages = intake.plan.pages
        if unwritten(pages).any():
            return True
        read = {*pages[sorted(intake.filled)].tolist(), *intake.sources_in_place()}
        return not read.isdisjoint(self.unconfirmed)

    def take(self) -> list[PageFill]:
        """What the workers must write before the step, once."""
        planned, self._planned = self._planned, []
        self.sent = [page for fill in planned for page in fill.pages.tolist()]
        self._number += 1
        self.unconfirmed.update(dict.fromkeys(self.sent, self._number))
        return planned

    def questions(self) -> Iterator[Question]:
        """Whether the pages are written, if any are."""
        if self.sent:
            yield Question((), partial(self._confirm, self.sent, self._number))

    def start_anew(self) -> None:
        """Nobody finds a page any more that may not be written, or none; what is written serves nobody else."""
        self._tables.evict({NULL_PAGE, *self.unconfirmed})
        self.unconfirmed = {}
        self._planned, self.sent = [], []
        self._page_of, self._content_of, self._source_of = {}, {}, {}

    def check_integrity(self) -> None:
        """Raises IntegrityError when a page is known for two contents."""
        if self._content_of != {page: content for content, page in self._page_of.items()}:
            raise IntegrityError("a page is filled with two texts")
        self.in_place.check_integrity()

    def _confirm(self, pages: list[int], number: int, _: Answer) -> None:
        for page in pages:
            if self.unconfirmed.get(page) == number:  # else it was handed out and is to be written again
                del self.unconfirmed[page]

    def _still_to_write(self, intake: Intake) -> Integers:
        """Slots of the plan whose pages are still to be written, int64 `[n]`; what has lost its sources is computed."""
        (slots,) = np.nonzero(unwritten(intake.plan.pages))
        if not len(slots):
            return slots
        there = intake.text.can_be_written(intake.plan.pages[slots])
        self._replace(intake, slots[~there], np.full(len(slots) - there.sum(), COMPUTED))
        return slots[there]

    def _lead_to_equal(self, intake: Intake) -> None:
        """Of what is not written yet for `intake`, read what is for others."""
        (slots,) = np.nonzero(unwritten(intake.plan.pages))
        if len(slots):
            contents = self._contents(intake, slots)
            pages = np.array([self._page(content) for content in contents], np.int64)
            fills = intake.text.fills(intake.plan.pages[slots])
            there = intake.text.can_be_written(intake.plan.pages[slots]) & (fills.shift == 0)
            pages[there] = fills.first[there]  # written for others with the same shift, whatever from
            known = pages != COMPUTED
            self._replace(intake, slots[known], pages[known])

    def _found(self, intake: Intake) -> set[int]:
        """Pages that `intake` would find, or that its plan leads it to."""
        pages = intake.plan.pages
        planned = pages[~unwritten(pages) & (pages != COMPUTED)]
        return {*self._tables.found_pages(intake.tracked.request), *planned.tolist()} - {NULL_PAGE}

    def _in_place(self, intake: Intake) -> tuple[int, set[int]]:
        """How many slots `intake` reads in place, if all that is undecided is, and which pages for it are free."""
        if not self.in_place.takes(intake):
            return 0, set()
        elsewhere, pages = intake.text.elsewhere, intake.plan.pages
        planned = pages[elsewhere.slot]
        open_still = (planned == COMPUTED) & (elsewhere.slot >= intake.covered) & (intake.entry is not None)
        found = elsewhere.where(unwritten(planned) | (planned == NULL_PAGE) | open_still)
        if not len(found):
            return 0, set()
        fills = intake.text.fills(found.page)
        sources = {*fills.first.tolist(), *fills.second.tolist()}
        return len(found), {page for page in sources if not self._tables.is_held(page)}

    def _write(self, intake: Intake, slots: Integers, keep: set[int]) -> bool:
        """Take pages for `slots [n]`, sources and `keep` excepted, and have them written; whether there were any."""
        fills = intake.text.fills(intake.plan.pages[slots])
        with self._tables.taken(len(slots), keep.union(fills.first.tolist(), fills.second.tolist())) as taken:
            if not taken:
                return False
            pages = np.array(taken, np.int64)
            numbers, contents = intake.plan.pages[slots], self._contents(intake, slots)
            for page, content in zip(taken, contents, strict=True):
                self._residents.remove(page)
                self._forget(page)
                self._page_of[content], self._content_of[page] = page, content
            intake.text.offer(slots, numbers, pages)
            self._source_of.update(zip(taken, self._residents.source[pages].tolist(), strict=True))
            self._planned.append(PageFill(pages, fills))
            self.unconfirmed.update(dict.fromkeys(taken, 0))
            self._replace(intake, slots, pages)
            self._statistics.add("pages_filled", len(taken))
            return True

    def _replace(self, intake: Intake, slots: Integers, pages: Integers) -> None:
        """In the plan of `intake`, let `slots [n]` read `pages [n]`, and lead the request to them."""
        found = intake.plan.pages.copy()
        found[slots] = pages
        intake.plan = replace(intake.plan, pages=found)
        self._lead(intake, slots[pages != COMPUTED])
        self._tables.renew(pages[pages != COMPUTED].tolist())

    def _lead(self, intake: Intake, slots: Integers) -> None:
        """Let the request find at `slots [n]` what its plan says."""
        pages = intake.plan.pages
        led = np.zeros(len(pages), bool)
        led[slots] = True
        for stretch in stretches(led):
            self._sharing.adopt(intake.tracked, GROUP, stretch.start, pages[stretch.start : stretch.stop].tolist())
            intake.filled.update(stretch)

    def _contents(self, intake: Intake, slots: Integers) -> list[Content]:
        fills = intake.text.fills(intake.plan.pages[slots])
        columns = intake.text.origins(intake.plan.pages[slots]), slots, fills.shift
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _page(self, content: Content) -> int:
        """The page with that content, or `COMPUTED`: it may have been handed out since."""
        page = self._page_of.get(content, COMPUTED)
        if page != COMPUTED and self._residents.source[page] != self._source_of[page]:
            self._forget(page)
            return COMPUTED
        return page

    def _forget(self, page: int) -> None:
        content = self._content_of.pop(page, None)
        if content is not None:
            del self._page_of[content]
