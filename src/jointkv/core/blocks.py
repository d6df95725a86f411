"""A view of paged K and V as vectors: norms, cosines, relative errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from jointkv.errors import LayoutError

VECTORS_BYTES = 4 << 20
"""Blocks widened to float32 at a time, all layers together: small enough to stay in the last-level cache."""

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LayerAggregate = Literal["rms", "max"]
"""How the errors of layers become one number: root mean square, or the worst layer."""


class BlockSide(NamedTuple):
    """Where the K blocks, or the V blocks, of pages lie.

    Attributes:
        layers: pages by layer, `[pages, ...]`.
        order: which elements of a page make its block, long `[r]` on the pages' device; None: all, as they lie.
    """

    layers: Sequence[Tensor]
    order: Tensor | None


class KVPages(Protocol):
    """Pages of the layers of one layer group, in whatever layout: `PagedKV` here, `PackedPages` in packed.py."""

    @property
    def num_pages(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def sides(self) -> tuple[BlockSide, BlockSide]:
        """K and V."""

    def vectors(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """The float32 K and V blocks `[layers, n, r]` of `pages [n]`, tokens in order."""

    def batches(self, count: int) -> Iterator[slice]:
        """Cut `count` blocks so that the K vectors of a part stay in the cache."""


def cut_batches(count: int, numbers: int) -> Iterator[slice]:
    """Cut `count` blocks of `numbers` numbers each, all layers together, so that a part stays in the cache."""
    step = max(1, VECTORS_BYTES // (4 * numbers))
    for start in range(0, count, step):
        yield slice(start, start + step)


def checked_pages(pages: KVPages, index: Tensor) -> Tensor:
    """The page numbers `index [n]` as contiguous int64 on the CPU.

    Raises:
        IndexError: a page number is out of range.
        LayoutError: not a vector of integers.
    """
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise LayoutError(f"page numbers must be integers [n], got {index.dtype} {list(index.shape)}")
    index = index.to("cpu", torch.long).contiguous()
    if len(index):
        least, most = (int(end) for end in index.aminmax())
        if least < 0 or most >= pages.num_pages:
            raise IndexError(f"pages {least} to {most} asked of {pages.num_pages}")
    return index


@dataclass(frozen=True)
class PagedKV:
    """K and V pages of the layers of one layer group. Holds references to the tensors, owns nothing else.

    Attributes:
        keys, values: per layer `[pages, t, h, d]`, tokens of a page in order; V may have its own `d`.

    Raises:
        LayoutError: no layers, shapes that differ between layers or between K and V, or an unsupported dtype.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    def __post_init__(self) -> None:
        if not self.keys or len(self.keys) != len(self.values):
            raise LayoutError(f"{len(self.keys)} K layers and {len(self.values)} V layers")
        for name, layers in (("K", self.keys), ("V", self.values)):
            for layer in layers:
                if layer.dim() != 4:
                    raise LayoutError(f"{name} pages must be [pages, t, h, d], got {list(layer.shape)}")
                if layer.dtype not in SUPPORTED_DTYPES:
                    raise LayoutError(f"{name} pages of {layer.dtype} are not supported")
                if layer.shape != layers[0].shape or layer.dtype != self.keys[0].dtype:
                    raise LayoutError(f"{name} pages differ between layers in shape or dtype")
        if self.keys[0].shape[:3] != self.values[0].shape[:3]:
            raise LayoutError("K and V pages differ in number of pages, tokens or heads")

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    @property
    def num_pages(self) -> int:
        return self.keys[0].shape[0]

    @property
    def block_size(self) -> int:
        """Tokens per page."""
        return self.keys[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page: K and V of all layers of the group."""
        return sum(layer[0].nbytes for layer in (*self.keys, *self.values))

    @property
    def sides(self) -> tuple[BlockSide, BlockSide]:
        return BlockSide(self.keys, None), BlockSide(self.values, None)

    def vectors(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        index = pages.to(self.device)
        keys, values = (
            torch.stack([layer.flatten(1).index_select(0, index) for layer in layers]).float()
            for layers in (self.keys, self.values)
        )
        return keys, values

    def batches(self, count: int) -> Iterator[slice]:
        return cut_batches(count, self.num_layers * self.keys[0][0].numel())


def as_vectors(layer: Tensor, pages: Tensor) -> Tensor:
    """Copy pages `[..., ]` of `layer [pages, t, h, d]` into float32 vectors `[..., r]`."""
    rows = layer.flatten(1).index_select(0, pages.reshape(-1))
    return rows.float().view(*pages.shape, -1)


TINY = 1e-30
"""Squared norms below this have lost their digits in float32; such blocks are only equal or not."""

RESOLUTION = 1e-14
"""Squared relative errors below this are lost in float32, or vanish with their squares: it stands for all of them."""

SMALLEST = torch.finfo(torch.float32).tiny


def relative(difference: Tensor, norm: Tensor) -> Tensor:
    """`difference / norm`, both squared, where 0/0 is 0, and x/0 and x over an overflown norm are infinity."""
    ratio = torch.where(norm.isinf(), norm, difference / norm)
    return torch.where(difference == 0, torch.zeros_like(ratio), ratio)


def _squares(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1).square()


class ServedErrors(NamedTuple):
    """Relative errors of `n` members over the layers of their group, float32 `[n]`, on the CPU.

    Attributes:
        key, value: of the whole block.
        token: of the worst single token, the larger one of K and V.
    """

    key: Tensor
    value: Tensor
    token: Tensor

    def take(self, selected: Tensor) -> ServedErrors:
        """The members that the mask or index `selected` picks."""
        return ServedErrors(*(error[selected] for error in self))


def block_errors(blocks: Tensor, read: Tensor, block_size: int, aggregate: LayerAggregate) -> tuple[Tensor, Tensor]:
    """Relative errors when `read` stands in for `blocks`, both `[layers, n, r]` in float32; `read` is overwritten.

    See `aggregate_errors` for `aggregate` and for what is returned.
    """
    return aggregate_errors(*squared_errors(blocks, read, block_size), aggregate)


def squared_errors(blocks: Tensor, read: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Squared norms `[..., tokens]` of what `read` differs by from `blocks`, both `[..., r]`, and of `blocks`.

    In float32; `read` is overwritten. Infinite where a token of zeros is read as another.
    """
    tokens = blocks.unflatten(-1, (block_size, -1))
    apart = read.sub_(blocks).unflatten(-1, (block_size, -1))
    norm = _squares(tokens)
    difference = lift_lost(_squares(apart), norm, apart)
    return difference.masked_fill_((norm < TINY) & (difference > 0), torch.inf), norm


def lift_lost(difference: Tensor, norm: Tensor, apart: Tensor) -> Tensor:
    """`difference`, above 0 wherever tokens differ at all.

    Args:
        difference, norm: squared norms `[...]`, as computed in float32.
        apart: what tokens differ by, `[..., numbers]`.
    """
    least = (RESOLUTION * norm).clamp(min=SMALLEST)
    lost = difference < least
    if lost.any():
        lost[lost.clone()] = (apart[lost] != 0).any(-1)
        difference = torch.where(lost, least, difference)
    return difference


def aggregate_errors(difference: Tensor, norm: Tensor, aggregate: LayerAggregate) -> tuple[Tensor, Tensor]:
    """Relative errors of blocks and of their worst tokens, `[n]` each, on the CPU.

    Args:
        difference, norm: squared norms `[layers, n, tokens]` of what a token differs by, and of the token itself.
    """
    block = relative(difference.sum(-1), norm.sum(-1))
    token = relative(difference, norm)
    if aggregate == "rms":
        block, token = block.mean(0), token.mean(0)
    else:
        block, token = block.amax(0), token.amax(0)
    return block.sqrt().cpu(), token.amax(-1).sqrt().cpu()


def served_errors(
    kv: KVPages,
    pages: Tensor,
    served_by: Tensor,
    aggregate: LayerAggregate,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> ServedErrors:
    """Relative errors when block `pages[i]` is read from page `served_by[i]`, times its scales.

    Args:
        pages, served_by: page numbers, `[n]`.
        k_scale, v_scale: factors `[layers, n]` on the page read; None means 1.
    """
    parts = [(torch.zeros(0),) * 3]
    for part in kv.batches(len(pages)):
        sides = []
        for blocks, read, scale in zip(
            kv.vectors(pages[part]), kv.vectors(served_by[part]), (k_scale, v_scale), strict=True
        ):
            if scale is not None:
                # Rounded as attention reads it, which may also overflow.
                read = read.mul_(scale[:, part, None].to(read.device)).to(kv.dtype).float()
            sides.append(block_errors(blocks, read, kv.block_size, aggregate))
        (key, key_token), (value, value_token) = sides
        parts.append((key, value, torch.maximum(key_token, value_token)))
    return ServedErrors(*(torch.cat(errors) for errors in zip(*parts, strict=True)))
