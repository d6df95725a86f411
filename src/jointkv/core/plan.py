"""Frozen results of deciding. Nothing here has a side effect on a pool or a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jointkv.errors import BadInput, LayoutError
from jointkv.system.files import replace_tensors

FORMAT = "jointkv.plan/1"
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

    def save(self, path: Path | str) -> None:
        """Write the plan as a safetensors file; `load` reads it back. Raises `BadInput`."""
        tensors = {
            field.name: getattr(self, field.name).contiguous()
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        }
        replace_tensors(path, tensors, {"format": FORMAT})

    @classmethod
    def load(cls, path: Path | str) -> FusionPlan:
        """Read a plan written by `save`.

        Raises:
            BadInput: no safetensors file, another format, or fields that are missing or malformed.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise BadInput(f"{path}: not a fusion plan ({FORMAT})")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _checked(cls(**tensors))
        except (SafetensorError, OSError, TypeError, LayoutError) as error:
            raise BadInput(f"{path}: not a fusion plan: {error}") from None


def _checked(plan: FusionPlan) -> FusionPlan:
    """`plan`. Raises LayoutError for fields that no plan has: a page below 0 would be counted from the end."""
    for name in ("row", "slot", "old_page", "page", "direction_page"):
        numbers = getattr(plan, name)
        if numbers is not None and (numbers.dtype != torch.long or numbers.dim() != 1 or (numbers < 0).any()):
            raise LayoutError(f"{name} is no list of whole numbers from 0")
    for name in ("key_error", "value_error", "token_error"):
        if not getattr(plan, name).is_floating_point():
            raise LayoutError(f"{name} is no list of numbers")
    scales = (plan.k_scale, plan.v_scale)
    directions = (plan.direction_page, plan.key_direction, plan.value_direction)
    if any(scale is not None for scale in scales):
        _check_layers("scales", scales, len(plan), 2)
    if any(part is not None for part in directions):
        pages = 0 if plan.direction_page is None else len(plan.direction_page)
        _check_layers("directions", directions[1:], pages, 5)
    return plan


def _check_layers(name: str, tensors: Sequence[Tensor | None], count: int, dimensions: int) -> None:
    """Raises LayoutError unless all are there, of floats, and agree on layers and on `count`."""
    shapes = {None if tensor is None else tensor.shape[:2] for tensor in tensors}
    agree = len(shapes) == 1 and all(shape is not None and shape[1:] == (count,) for shape in shapes)
    if not agree or any(each is None or each.dim() != dimensions or not each.is_floating_point() for each in tensors):
        raise LayoutError(f"{name} are missing or differ in shape")
