"""What the comparisons of an exactly computed request say of reuse."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Compared:
    """A resident page, held against the exactly computed block that it would have served.

    Attributes:
        ratio: error over bound.
        witnesses, worst, new: what was known of the page before, see `core.evidence`.
        seen: which of its tokens stand before the block, in the audited request.
    """

    slot: int
    page: int
    source: int
    exact: bool
    ratio: float
    witnesses: int
    worst: float
    new: bool
    seen: int


@dataclass
class Audit:
    """The comparisons of one request, computed exactly from the first token on.

    Attributes:
        pages: by slot, those that could have served; where none are named, whatever is compared counts.
        chosen: by the draw, after a licence; its blocks keep their pages until the prompt is computed, so that all of
            it is exact.
        compared: what has come back.
        outstanding: pairs whose answers are still to come.
    """

    pages: dict[int, list[int]] = field(default_factory=dict)
    chosen: bool = False
    compared: list[Compared] = field(default_factory=list)
    outstanding: int = 0
