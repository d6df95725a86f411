"""Frozen results of deciding. Nothing here has a side effect on a pool or a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.errors import LayoutError

MEMBER_FIELDS = ("row", "slot", "old_page", "page", "key_error", "value_error", "token_error")


@dataclass(frozen=True)
class BlockRef:
    """What one logical block reads: tokens `first .. first + count - 1` of `page`.

    Attributes:
        page: page number in the pool.
        k_scale, v_scale: factors on the K and V that the page holds (a block's own norm over the page's).
        shift: position of this block minus the position at which the page's K was computed, in tokens; attention
            turns the query back by it.
        first, count: the valid tokens of the page.
    """

    page: int
    k_scale: float = 1.0
    v_scale: float = 1.0
    shift: int = 0
    first: int = 0
    count: int = 16


@dataclass(frozen=True)
class FusionPlan:
    """Which member reads which page, for one layer group of one block table.

    `n` members, `m` directions, `L` layers in the group. A representative served by its own untouched page is no
    member; one whose page becomes a shared direction is.

    Attributes:
        row, slot: the member's sequence and logical block, `[n]`.
        old_page, page: the page it read when the plan was made and the page it is to read, `[n]`.
        key_error, value_error: achieved relative errors over the group's layers, `[n]`.
        token_error: achieved relative error of the worst single token, in K or V, `[n]`.
        k_scale, v_scale: `[L, n]`, or None where every scale is 1.
        direction_page: pages to be overwritten with a shared direction, `[m]`, or None.
        key_direction, value_direction: what to write, `[L, m, t, h, d]` in the pages' dtype.
    """

    row: Tensor
    slot: Tensor
    old_page: Tensor
    page: Tensor
    key_error: Tensor
    value_error: Tensor
    token_error: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    direction_page: Tensor | None = None
    key_direction: Tensor | None = None
    value_direction: Tensor | None = None

    def __post_init__(self) -> None:
        for name in MEMBER_FIELDS:
            if getattr(self, name).shape != self.row.shape:
                raise LayoutError(f"plan: {name} and row differ in length")

    def __len__(self) -> int:
        """Number of members."""
        return len(self.row)

    @classmethod
    def empty(cls) -> FusionPlan:
        """A plan that changes nothing."""
        none, zero = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        return cls(none, none, none, none, zero, zero, zero)

    @classmethod
    def join(cls, plans: Sequence[FusionPlan]) -> FusionPlan:
        """One plan with the members of several that use no scales and no directions."""
        plans = [plan for plan in plans if len(plan)]
        if len(plans) < 2:
            return plans[0] if plans else cls.empty()
        return cls(**{name: torch.cat([getattr(plan, name) for plan in plans]) for name in MEMBER_FIELDS})

    @property
    def pages_released(self) -> int:
        """References that leave a page for another one (predicted; the pool says what was really freed)."""
        return int((self.old_page != self.page).sum())
