"""When a resident block may stand for one that is not computed.

What was never computed cannot be compared. What can be known of it: how far the *entry block* of the same run is from
the source's, and how far *witnesses* of the same page were, earlier comparisons with the same tokens behind other
contexts. Both are ratios: error over bound, the larger one of block and token, so that 1 is what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ReuseRule:
    """Decides by evidence which blocks of a run are reused.

    Attributes:
        least: blocks that a reused stretch has at least.
        sources: whose entry blocks are compared at the most; the nearest serves.
        witnesses: comparisons of a page that suffice without a near entry block.
        margin: ratio up to which a witness is clean.
    """

    least: int = 2
    sources: int = 4
    witnesses: int = 2
    margin: float = 0.7

    def usable(self, entry: float, count: NDArray[np.int64], worst: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which blocks of a run may be reused, bool `[n]`.

        Args:
            entry: ratio of the run's entry block.
            count, worst: witnesses of each page and the largest of their ratios, `[n]`.
        """
        clean = worst <= self.margin
        return clean & ((count >= self.witnesses) | (entry <= 1.0))
