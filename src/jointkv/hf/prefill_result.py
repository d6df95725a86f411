"""What a prefill did, by prompt and in all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowPrefill:
    """What was done for one prompt.

    Attributes:
        tokens: of the prompt.
        exact: tokens whose K and V are resident from the first token on, in blocks; they are read as they are.
        skipped: tokens of blocks behind other contexts that are read instead of being computed.
        moved: those of them that stand at another position there; they were copied, their keys turned.
        reused: slots of these blocks, in order.
        runs, gaps: stretches of blocks that are read, and stretches of computed blocks before reused ones.
        audited: whether it was computed, and compared with what would have been reused.
        audited_blocks, missed_blocks: blocks that would have been, and those of them beyond the bounds.
        audited_moved, missed_moved: those of both that stand at another position there.
    """

    tokens: int
    exact: int = 0
    skipped: int = 0
    moved: int = 0
    reused: tuple[int, ...] = ()
    runs: int = 0
    gaps: int = 0
    audited: bool = False
    audited_blocks: int = 0
    missed_blocks: int = 0
    audited_moved: int = 0
    missed_moved: int = 0

    @property
    def computed(self) -> int:
        """Tokens that the model reads, those left to `generate` included."""
        return self.tokens - self.exact - self.skipped


@dataclass(frozen=True)
class PrefillResult:
    """What `JointCache.prefill` did, by row; the properties are sums, see `RowPrefill`."""

    rows: tuple[RowPrefill, ...]

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)

    @property
    def exact(self) -> int:
        return sum(row.exact for row in self.rows)

    @property
    def skipped(self) -> int:
        return sum(row.skipped for row in self.rows)

    @property
    def moved(self) -> int:
        return sum(row.moved for row in self.rows)

    @property
    def computed(self) -> int:
        return sum(row.computed for row in self.rows)

    @property
    def audits(self) -> int:
        """Rows that were computed and compared."""
        return sum(row.audited for row in self.rows)

    @property
    def audited_blocks(self) -> int:
        return sum(row.audited_blocks for row in self.rows)

    @property
    def missed_blocks(self) -> int:
        return sum(row.missed_blocks for row in self.rows)
