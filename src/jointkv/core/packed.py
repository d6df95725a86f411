"""A view of pages whose elements lie in an order of their own, such as one made for a processor's instructions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from jointkv.core.blocks import BlockSide, cut_batches
from jointkv.errors import LayoutError

PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Elements are moved as plain bits: torch cannot gather every float8 type."""

LANES = 32
"""Elements in a row, as in elements.h."""


class RowPatterns(NamedTuple):
    """Pages as rows of `LANES` elements; rows whose lanes belong to the same slots share a pattern.

    A slot is a token of K, or, after all of those, a token of V. Consecutive rows of a pattern are one run.

    Attributes:
        slot: `[rows, LANES]` int32, lanes in the order in which the kernel unpacks them; the last row filled up.
        pattern_row: `[patterns]`, a row that has the pattern.
        fold: `[patterns]`, a power of two: the slots of a pattern repeat after so many lanes.
        first_run: `[patterns + 1]`, where the runs of a pattern begin.
        run_row, run_length: `[runs]`, in rows.
    """

    slot: Tensor
    pattern_row: Tensor
    fold: Tensor
    first_run: Tensor
    run_row: Tensor
    run_length: Tensor


@dataclass(frozen=True)
class PackedPages:
    """K and V pages of the layers of one layer group. Holds references to the tensors, owns nothing else.

    Attributes:
        layers: per layer `[pages, elements]`; the elements of a page are contiguous, pages need not be.
        token_of: `[elements]` long; which token of the block an element belongs to.
        is_value: `[elements]` bool; whether it belongs to V.

    Raises:
        LayoutError: no layers, layers that differ, an unsupported dtype, or tokens of unequal size.
    """

    layers: Sequence[Tensor]
    token_of: Tensor
    is_value: Tensor

    def __post_init__(self) -> None:
        if not self.layers:
            raise LayoutError("no layers")
        first = self.layers[0]
        if first.dim() != 2:
            raise LayoutError(f"pages must be [pages, elements], got {list(first.shape)}")
        if first.dtype not in PACKED_DTYPES:
            raise LayoutError(f"pages of {first.dtype} are not supported")
        if first.stride(1) != 1 or first.stride(0) < first.shape[1]:
            raise LayoutError(f"the elements of a page must be contiguous, got strides {list(first.stride())}")
        kind = (first.shape, first.stride(), first.dtype, first.device)
        if any((layer.shape, layer.stride(), layer.dtype, layer.device) != kind for layer in self.layers):
            raise LayoutError("pages differ between layers in shape, stride, dtype or device")
        for name, dtype in (("token_of", torch.long), ("is_value", torch.bool)):
            told = getattr(self, name)
            if told.shape != first.shape[1:] or told.dtype != dtype:
                raise LayoutError(f"{name} must be {dtype} [{first.shape[1]}], got {told.dtype} {list(told.shape)}")
        if not len(self.token_of) or self.token_of.min() < 0 or self.token_of.max() >= len(self.token_of):
            raise LayoutError("token_of must number the tokens of a block from 0")
        sizes = self.slots.bincount(minlength=2 * self.block_size).view(2, -1)
        if not (sizes > 0).all() or (sizes != sizes[:, :1]).any():
            raise LayoutError("every token must have the same number of K elements, and of V elements, not 0")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_pages(self) -> int:
        return self.layers[0].shape[0]

    @cached_property
    def block_size(self) -> int:
        """Tokens per page."""
        return int(self.token_of.max()) + 1

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page: K and V of all layers of the group."""
        return self.num_layers * self.layers[0].shape[1] * self.layers[0].itemsize

    @cached_property
    def slots(self) -> Tensor:
        """The slot of each element, `[elements]` long on the CPU; see `RowPatterns`."""
        return self.token_of.cpu() + self.is_value.cpu() * self.block_size

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """The elements of K and those of V, token by token."""
        order, num_keys = self.slots.argsort(stable=True).to(self.device), int((~self.is_value).sum())
        return order[:num_keys], order[num_keys:]

    @property
    def sides(self) -> tuple[BlockSide, BlockSide]:
        keys, values = self.order
        return BlockSide(self.layers, keys), BlockSide(self.layers, values)

    @cached_property
    def offsets(self) -> Tensor:
        """`order` as one table, int32 on the pages' device, where it stays."""
        return torch.cat(self.order).int()

    @cached_property
    def starts(self) -> Tensor:
        """See `addresses`; on the device, where it stays."""
        return addresses(self.layers)

    def vectors(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVPages`. The order inside a token is that of the page."""
        index, dtype = pages.to(self.device), self.layers[0].dtype
        bits = BITS[dtype.itemsize]
        held = torch.stack([layer.view(bits).index_select(0, index) for layer in self.layers])
        keys, values = (held.index_select(2, order).view(dtype).float() for order in self.order)
        return keys, values

    def batches(self, count: int) -> Iterator[slice]:
        return cut_batches(count, self.num_layers * len(self.order[0]))

    @cached_property
    def row_patterns(self) -> RowPatterns:
        """The tables by which the kernel of pair_sums.c reads these pages, on the CPU."""
        whole = len(self.slots) // LANES
        filled = torch.nn.functional.pad(self.slots, (0, -len(self.slots) % LANES))
        rows = filled.view(-1, LANES)[:, lane_order(self.layers[0].dtype)]
        patterns, pattern = torch.unique(rows[:whole], dim=0, return_inverse=True)
        starts = (pattern.diff(prepend=torch.tensor([-1])) != 0).nonzero()[:, 0]
        lengths = starts.diff(append=torch.tensor([whole]))
        by_pattern = pattern[starts].argsort(stable=True)
        first_run = pattern[starts].bincount(minlength=len(patterns)).cumsum(0)
        first_run = torch.nn.functional.pad(first_run, (1, 0))
        run_row = starts[by_pattern]
        return RowPatterns(
            slot=rows.int().contiguous(),
            pattern_row=run_row[first_run[:-1]],
            fold=_folds(patterns),
            first_run=first_run,
            run_row=run_row,
            run_length=lengths[by_pattern],
        )


def addresses(layers: Sequence[Tensor]) -> Tensor:
    """Where the layers begin in their device's memory, `[layers]` long on that device."""
    return torch.tensor([layer.data_ptr() for layer in layers]).to(layers[0].device, non_blocking=True)


def lane_order(dtype: torch.dtype) -> Tensor:
    """Which element of a row each lane of the kernel holds, `[LANES]`: see `decode` in elements.h."""
    elements = torch.arange(LANES)
    if dtype in (torch.float32, torch.float16):
        return elements
    return elements.view(2, -1, 2).transpose(1, 2).flatten()


def _folds(patterns: Tensor) -> Tensor:
    fold = torch.full((len(patterns),), LANES)
    width = LANES
    repeats = torch.ones(len(patterns), dtype=torch.bool)
    while width > 1:
        repeats = repeats & (patterns[:, : width // 2] == patterns[:, width // 2 : width]).all(1)
        width //= 2
        fold[repeats] = width
    return fold
