"""When a resident block may stand for one that is not computed.

What was never computed cannot be compared. What can be known of it: how far the *entry block* of the same run is from
the source's, and how far *witnesses* of the same page were, earlier comparisons with the same tokens behind other
contexts. Both are ratios: error over bound, the larger one of block and token, so that 1 is what is allowed. A witness
does not tell of *echoes* that its own context lacked: tokens of the block that also stand before the run, see
`core.evidence`. Measured in docs/reuse.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jointkv.core.reuse import Integers, ReusePlan, Run, Runs


@dataclass(frozen=True)
class ReuseRule:
    """Decides by evidence which blocks of a run are reused.

    With n witnesses the next ratio is expected up to `1 + 1/n` times the worst of them.

    Attributes:
        least: blocks that a reused stretch has at least.
        sources: whose entry blocks are compared at the most; the nearest serves.
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

    def usable(
        self,
        entry: float,
        count: NDArray[np.int64],
        worst: NDArray[np.float32],
        new: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.bool_]:
        """Which blocks of a run may be reused, bool `[n]`.

        Args:
            entry: ratio of the run's entry block.
            count, worst: witnesses of each page within the bounds, and the largest ratio of all that tell, `[n]`.
            new: blocks with echoes that no witness covers, see `Evidence.new`, `[n]`; None where none has any.
        """
        expected = worst * (1.0 + 1.0 / np.maximum(count, 1))
        known = (count >= self.witnesses) | (entry <= self.near)
        allowed = known & (expected <= self.margin)
        return allowed if new is None or not self.echoes else allowed & ~new


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

    def adopted(self, end: int) -> None:
        """Blocks up to `end` are decided."""
        self.at, self.wait = end, 0


class Steps(Protocol):
    """How a prompt gets on while its reuse is decided."""

    def compute(self, slot: int) -> None:
        """Have everything before `slot` computed or adopted."""

    def adopt(self, first: int, pages: Integers) -> None:
        """Let the slots from `first` on, up to which all is there, read `pages [n]`."""

    def ratios(self, slots: Integers, pages: Integers) -> NDArray[np.floating]:
        """How far the own blocks of `slots [n]` are from those in `pages [n]`: error over bound, `[n]`."""

    def usable(self, run: Run, entry: float) -> NDArray[np.bool_]:
        """Which blocks of `run`, which follows an entry block of that ratio, `ReuseRule.usable` allows."""


class Computed:
    """What steps have in common where a prompt is computed already: nothing is computed and nothing adopted."""

    def compute(self, slot: int) -> None:
        return

    def adopt(self, first: int, pages: Integers) -> None:
        return


@dataclass(frozen=True)
class Decided:
    """What was decided on one prompt: the plan, and of each run in it from behind its entry block to its last use."""

    plan: ReusePlan
    runs: tuple[range, ...]


def decide(runs: Runs, start: int, end: int, rule: ReuseRule, steps: Steps) -> Decided:
    """Walk through the runs of a prompt between the slots `start` and `end`; the nearest source of each is adopted."""
    plan, found, search = ReusePlan.nothing(end), [], Search(start)
    while (entry := runs.next_entry(search.at, end, rule.least + 1)) is not None:
        steps.compute(entry + 1)
        sources = runs.through(entry, end, rule.least + 1, rule.sources)
        ratios = steps.ratios(np.full(len(sources), entry), np.array([run.pages[0] for run in sources]))
        nearest = int(np.nan_to_num(ratios, nan=np.inf).argmin())
        run = sources[nearest].behind
        wider = plan.adopting(run, steps.usable(run, float(ratios[nearest])), rule.least)
        new = [stretch for stretch in wider.reused if stretch.start > entry]
        for stretch in new:
            steps.compute(stretch.start)
            steps.adopt(stretch.start, wider.pages[stretch.start : stretch.stop])
        if new:
            found.append(range(run.first, new[-1].stop))
            search.adopted(new[-1].stop)
        else:
            search.refused(entry)
        plan = wider
    return Decided(plan, tuple(found))
