"""When a resident block may stand for one that is not computed.

What was never computed cannot be compared. What can be known of it: how far *witnesses* of the same page were, earlier
comparisons with the same tokens behind other contexts, and, where a page has none, how far the *entry block* of the
same run is from the source's. Both are ratios: error over bound, the larger one of block and token, so that 1 is what
is allowed. A witness does not tell of *echoes* that its own context lacked: tokens of the block that also stand before
the run, see `core.evidence`. Measured in docs/reuse.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from jointkv.core.evidence import Known
from jointkv.core.moved_text import unwritten
from jointkv.core.reuse import COMPUTED, Found, Integers, ReusePlan, Run, Runs

Class = TypeVar("Class")
"""What pages have in common that share a licence."""


@dataclass(frozen=True)
class ReuseRule:
    """Decides by evidence which blocks of a run are reused.

    With n witnesses the next ratio is expected up to `1 + 1/n` times the worst of them.

    Attributes:
        least: blocks that a reused stretch has at least.
        sources: whose entry blocks are compared at the most, of which the nearest serves; also pages of a slot that an
            audit compares.
        witnesses: comparisons of a page that suffice without a near entry block.
        margin: up to which the expected ratio may go.
        near: ratio of the entry block up to which it stands in for missing witnesses, where nothing is new.
        echoes: whether new echoes keep a block from being reused.
    """

    least: int = 2
    sources: int = 4
    witnesses: int = 1
    margin: float = 1.0
    near: float = 0.5
    echoes: bool = True

    def expected(self, known: Known, entry: float = math.inf) -> NDArray[np.floating]:
        """Up to which ratio the blocks that pages stand for are expected, `[n]`; infinite where too little is known.

        Args:
            known: of the pages.
            entry: ratio of the entry block before them; infinite where none was compared.
        """
        enough = (known.count >= self.witnesses) | (entry <= self.near)
        if self.echoes:
            enough &= ~known.new
        return np.where(enough, known.worst * (1.0 + 1.0 / np.maximum(known.count, 1)), np.inf)

    def usable(self, known: Known, entry: float = math.inf) -> NDArray[np.bool_]:
        """Which of the pages may be read, bool `[n]`; arguments as of `expected`."""
        allowed: NDArray[np.bool_] = self.expected(known, entry) <= self.margin
        return allowed

    def witnessed(self, found: Found, known: Known, slots: int) -> ReusePlan:
        """What is reused of a prompt by evidence of pages alone.

        Of several pages for a slot those whose context was computed go first, so that a licence for these alone leads
        to the same ones, then the ones that are expected nearest.

        Args:
            known: of the pages `found`.
            slots: of the prompt that may be reused at all.
        """
        if not self.usable(known).any():
            return ReusePlan.nothing(slots)
        first = found.first_by(self._order(found, known))
        chosen = first[self.usable(known.where(first))]
        pages = np.full(slots, COMPUTED, np.int64)
        pages[found.slot[chosen]] = found.page[chosen]
        return ReusePlan.nothing(slots).adopting(0, pages, self.least)

    def asked(self, found: Found, known: Known) -> Found:
        """What an audit compares: of each slot at most `sources` pages, those that would serve first."""
        order = np.lexsort((self._order(found, known), found.slot))
        place = np.arange(len(order))
        starts = np.maximum.accumulate(np.where(np.diff(found.slot[order], prepend=-1) != 0, place, 0))
        return found.where(order[place - starts < self.sources])

    def unwitnessed(self, found: Found, known: Known, plan: ReusePlan) -> Runs:
        """Runs that `plan` does not read, and that would be read in part behind a near entry block.

        One entry block stands for all of a source's blocks, also behind some that are too far.
        """
        unread = plan.pages[found.slot] == COMPUTED
        usable = self.usable(known, 0.0)
        return found.where(unread).runs(usable[unread])

    def behind(
        self, plan: ReusePlan, run: Run, known: Known, entry: float, permitted: NDArray[np.bool_] | None = None
    ) -> ReusePlan:
        """`plan`, and what may be read of `run [n]`, whose entry block has the ratio `entry`.

        Args:
            known: of the pages of `run`.
            permitted: which of them may be read at all, bool `[n]`; None: all.
        """
        usable = self.usable(known, entry) if permitted is None else self.usable(known, entry) & permitted
        return plan.adopting(run.first, np.where(usable, run.pages, COMPUTED), self.least)

    def serving(self, sources: Sequence[Run], ratios: NDArray[np.floating]) -> int:
        """Which of `sources`, whose entry blocks have the `ratios [n]`, serves: the nearest.

        Of those that are near enough, the nearest one whose pages stand where they are read: they need not be written.
        """
        cost = np.nan_to_num(ratios, nan=np.inf, posinf=np.inf)
        moved = unwritten(np.array([run.pages[0] for run in sources]))
        standing = ~moved & (cost <= self.near)
        return int(np.where(standing | ~standing.any(), cost, np.inf).argmin())

    def _order(self, found: Found, known: Known) -> NDArray[np.floating]:
        """Of several pages for a slot the one with the smallest number serves, `[n]`."""
        expected = self.expected(known)
        return np.where(expected <= self.margin, expected - found.exact * (1.0 + self.margin), np.inf)


@dataclass
class Search:
    """Where the next entry block of a prompt is looked for.

    Where nothing of a run may be reused, later blocks of it are tried as entry blocks, at doubling distances: they are
    computed anyway, and the farther from what differs, the nearer they are.

    Attributes:
        at: blocks before are decided.
        wait: blocks that are passed over after a refusal.
    """

    at: int
    wait: int = 0

    def refused(self, entry: int) -> None:
        """Nothing behind the entry block `entry` is reused."""
        self.at, self.wait = entry + 1 + self.wait, 2 * self.wait + 1

    def heard(self, entry: int, before: ReusePlan, after: ReusePlan) -> None:
        """Behind the entry block `entry` what `after` reads is reused, `before` read without it."""
        new = np.flatnonzero(after.pages != before.pages)
        if len(new):
            self.at, self.wait = int(new[-1]) + 1, 0
        else:
            self.refused(entry)


class Steps(Protocol):
    """How a prompt gets on while its reuse is decided."""

    def compute(self, slot: int) -> None:
        """Have everything before `slot` computed or adopted."""

    def adopt(self, first: int, pages: Integers) -> None:
        """Let the slots from `first` on, up to which all is there, read `pages [n]`."""

    def ratios(self, slots: Integers, pages: Integers) -> NDArray[np.floating]:
        """How far the own blocks of `slots [n]` are from those in `pages [n]`: error over bound, `[n]`."""

    def known(self, slots: Integers, pages: Integers) -> Known:
        """What evidence says of `pages [n]` for the prompt's blocks `slots [n]`."""


class Computed:
    """What steps have in common where a prompt is computed already: nothing is computed and nothing adopted."""

    def compute(self, slot: int) -> None:
        return

    def adopt(self, first: int, pages: Integers) -> None:
        return


def decide(found: Found, start: int, end: int, rule: ReuseRule, steps: Steps, by_entries: bool = True) -> ReusePlan:
    """Walk through a prompt between the slots `start` and `end`, from which every stretch that is reused is adopted.

    What witnesses allow needs no comparison. Of what has none, the nearest source of each run serves.

    Args:
        by_entries: whether entry blocks are compared; else what has no witnesses is computed.
    """
    found = found.where((found.slot >= start) & (found.slot < end))
    known = steps.known(found.slot, found.page)
    plan = rule.witnessed(found, known, end)
    runs, walk = rule.unwitnessed(found, known, plan), _Walk(start, steps)
    search = Search(start if by_entries else end)
    while (entry := runs.next_entry(search.at, end, rule.least + 1)) is not None:
        walk.to(plan, entry)
        steps.compute(entry + 1)
        sources = runs.through(entry, end, rule.least + 1, rule.sources)
        ratios = steps.ratios(np.full(len(sources), entry), np.array([run.pages[0] for run in sources]))
        nearest = rule.serving(sources, ratios)
        run = sources[nearest].behind
        known = steps.known(np.arange(run.first, run.end), run.pages)
        wider = rule.behind(plan, run, known, float(ratios[nearest]))
        search.heard(entry, plan, wider)
        plan = wider
    walk.to(plan, end)
    return plan


def audited(
    found: Found,
    classes: Mapping[Class, NDArray[np.bool_]],
    licensed: Collection[Class],
    drawn: bool,
    start: int,
    end: int,
    rule: ReuseRule,
    steps: Steps,
    by_entries: bool = True,
) -> Iterator[tuple[list[Class], ReusePlan]]:
    """What a computed prompt would have read, had it not been computed, by the classes that this says something of.

    For classes that have a licence only who was drawn speaks: others are computed because reuse has found nothing for
    them, and of them there may be fifty for one that is drawn. A class without one is taken as if it had one besides.

    Args:
        classes: which of `found [n]` are of each, bool `[n]`.
        licensed: those that have a licence.
        drawn: whether the prompt could have read what they have, and is computed by chance.
        by_entries: as in `decide`.

    Yields:
        Classes, and the plan whose pages of these count.
    """
    readable = np.zeros(len(found), bool)
    for each in licensed:
        readable |= classes[each]
    if drawn and licensed:
        yield list(licensed), decide(found.where(readable), start, end, rule, steps, by_entries)
    for each, its in classes.items():
        if each not in licensed and its.any():
            yield [each], decide(found.where(readable | its), start, end, rule, steps, by_entries)


class _Walk:
    """How far a prompt is computed or adopted."""

    def __init__(self, start: int, steps: Steps) -> None:
        self._at, self._steps = start, steps

    def to(self, plan: ReusePlan, slot: int) -> None:
        """Adopt what `plan` reuses before `slot`, and compute what lies between."""
        for stretch in plan.reused:
            first, stop = max(stretch.start, self._at), min(stretch.stop, slot)
            if first < stop:
                self._steps.compute(first)
                self._steps.adopt(first, plan.pages[first:stop])
        self._at = max(self._at, slot)
