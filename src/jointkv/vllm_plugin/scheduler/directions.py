"""Directions that blocks of a batch share, written to pages of their own (paper, Algorithm 1).

Blocks that become full together at one place, and that no resident page may serve, are compared all with all. The tree
of the offline plan groups them by these cosines. For each group a page is taken from the pool, the workers write the
mean direction before the next step and compare it with every member, own norms included: those that are within the
bounds read it from then on, and their pages are freed. Two of them at the least, or nothing is shared: one page is
given for those that are won. The page that is written was free until then, so nobody reads it while it is written.
Nobody leaves it before his request ends: a block that is full does not change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from jointkv.errors import IntegrityError
from jointkv.vllm_plugin.messages import DirectionWrite, Pair
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.bounds import Bounds
from jointkv.vllm_plugin.scheduler.candidates import Candidates, Member
from jointkv.vllm_plugin.scheduler.questions import Answer, Gathering, Question
from jointkv.vllm_plugin.scheduler.sharing import Sharing

MOST_TOGETHER = 128
"""Blocks of one place that are compared all with all; more than that are several batches."""


@dataclass(eq=False)
class _Direction:
    """A page that is to hold the direction of `members`, held for them; None once it is given back.

    Attributes:
        ended: requests of members that have.
    """

    group: int
    page: int | None
    members: list[Member]
    ended: set[str] = field(default_factory=set)


class Directions:
    """Groups blocks, has their directions written, and lets them read these.

    Args:
        candidates: whether a block is still what it was.
        bounds: which blocks belong together, and which may read their direction.
        sharing: carries out.
        statistics: counts.
    """

    def __init__(self, candidates: Candidates, bounds: Bounds, sharing: Sharing, statistics: Statistics) -> None:
        self._candidates, self._bounds, self._sharing = candidates, bounds, sharing
        self._statistics = statistics
        self._batch: dict[Hashable, list[Member]] = defaultdict(list)
        self._planned: list[_Direction] = []
        self._sent: list[_Direction] = []
        self._open: list[_Direction] = []

    def collect(self, member: Member) -> None:
        """`member` keeps its page for now."""
        self._batch[member.places[0]].append(member)

    def gatherings(self) -> list[Gathering]:
        """Blocks that came together, to be compared all with all after the step."""
        batch, self._batch = self._batch, defaultdict(list)
        found = []
        for together in batch.values():
            members = [one for one in together if self._may_move(one)]
            for start in range(0, len(members) - 1, MOST_TOGETHER):
                part = members[start : start + MOST_TOGETHER]
                if len(part) > 1:
                    found.append(Gathering(part[0].group, [one.page for one in part], partial(self._plan, part)))
        return found

    def take(self, step: int) -> list[DirectionWrite]:
        """What the workers must write before `step`, once."""
        planned, self._planned = self._planned, []
        for direction in planned:
            direction.members = [one for one in direction.members if self._may_move(one)]
            if len(direction.members) < 2:
                self._release(direction)
        self._sent = [direction for direction in planned if direction.page is not None]
        writes = []
        for direction in self._sent:
            assert direction.page is not None
            self._candidates.note_written([direction.page], step)
            writes.append(DirectionWrite(direction.group, direction.page, tuple(one.page for one in direction.members)))
        self._statistics.add("directions_written", len(writes))
        return writes

    def questions(self) -> Iterator[Question]:
        """How far the members of what is written before the step are from it."""
        sent, self._sent = self._sent, []
        for direction in sent:
            if direction.page is not None:
                pairs = [Pair(direction.group, one.page, direction.page) for one in direction.members]
                yield Question(pairs, partial(self._settle, direction))

    def dismiss(self, request_id: str) -> None:
        """A request has ended: no page is held for one member alone, whose step may never come."""
        for direction in list(self._open):
            direction.ended.add(request_id)
            if sum(one.tracked.request.request_id not in direction.ended for one in direction.members) < 2:
                self._release(direction)

    def start_anew(self) -> None:
        """Forget what was to be done, and hold no page."""
        for direction in list(self._open):
            self._release(direction)
        self._batch, self._planned, self._sent = defaultdict(list), [], []

    def check_integrity(self) -> None:
        """Raises IntegrityError when a page is held for nobody, or read before it is verified."""
        held = sorted(direction.page for direction in self._open if direction.page is not None)
        if held != sorted(self._sharing.tables.held):
            raise IntegrityError("pages are held that no direction is written to")
        for page in held:
            if self._sharing.tables.pool.blocks[page].ref_cnt != 1:
                raise IntegrityError(f"page {page} is read while a direction is written to it")

    def _plan(self, members: Sequence[Member], cosines: NDArray[np.float32]) -> None:
        """Take a page for every group of `members`, whose `cosines [2, n, n]` are those of K and of V."""
        group = members[0].group
        together: dict[int, list[Member]] = defaultdict(list)
        for member, leader in zip(members, self._bounds.leaders(group, cosines), strict=True):
            if self._may_move(member):
                together[leader].append(member)
        for alike in together.values():
            if len(alike) < 2:
                continue
            page = self._sharing.tables.hold()
            if page is None:
                self._statistics.reject("no_free_page")
                continue
            self._candidates.residents.remove(page)
            direction = _Direction(group, page, alike)
            self._planned.append(direction)
            self._open.append(direction)

    def _settle(self, direction: _Direction, answer: Answer) -> None:
        """Members within the bounds read the page, if there are two."""
        page = direction.page
        if page is None:
            return
        readers = []
        for place, member in enumerate(direction.members):
            reason = self._refused(member) if answer.within[place] else "bound"
            if reason is None and not self._candidates.unchanged(member):
                reason = "entry_changed"
            if reason is None:
                readers.append((member, float(answer.block[place]), float(answer.token[place])))
            else:
                self._statistics.reject(reason)
        try:
            for member, block, token in readers if len(readers) > 1 else ():
                self._sharing.share(member.tracked, member.group, member.slot, page, exact=False, step=answer.step)
                self._candidates.give_up(member)
                self._statistics.merged(block, frees=member is not readers[0][0])
                self._statistics.add("blocks_merged_by_direction")
                if member.of_prompt:
                    self._bounds.served(member.group, block, token)
        finally:
            self._release(direction)

    def _release(self, direction: _Direction) -> None:
        """The page is its readers' alone, or free."""
        page, direction.page = direction.page, None
        self._open = [other for other in self._open if other is not direction]
        if page is not None:
            self._sharing.tables.release(page)

    def _may_move(self, member: Member) -> bool:
        """Whether what stands at the slot of `member` could be given up in a step or two."""
        return self._refused(member) in (None, "not_cached_yet") and self._candidates.unchanged(member)

    def _refused(self, member: Member) -> str | None:
        return self._sharing.refused(member.tracked, member.epoch, member.group, member.slot, member.page)
