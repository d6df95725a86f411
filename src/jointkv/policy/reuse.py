"""When a resident block may stand for one that is not computed.

What was never computed cannot be compared. What can be known of it: how far the *entry block* of the same run is from
the source's, and how far *witnesses* of the same page were, earlier comparisons with the same tokens behind other
contexts. Both are ratios: error over bound, the larger one of block and token, so that 1 is what is allowed. A witness
does not tell of *echoes* that its own context lacked: tokens of the block that also stand before the run, see
`core.evidence`. Measured in docs/reuse.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
    """

    least: int = 2
    sources: int = 4
    witnesses: int = 1
    margin: float = 1.0
    near: float = 0.5

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
        return allowed if new is None else allowed & ~new
