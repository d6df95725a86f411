"""A view of paged K and V as vectors: norms, cosines, relative errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.errors import LayoutError

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    def page_nbytes(self) -> int:
        """Bytes of one page: K and V of all layers of the group."""
        return sum(layer[0].nbytes for layer in (*self.keys, *self.values))

    def vectors(self, pages: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield per layer the float32 K and V blocks `[*pages.shape, r]` that `pages` name."""
        index = pages.to(self.device)
        for keys, values in zip(self.keys, self.values, strict=True):
            yield as_vectors(keys, index), as_vectors(values, index)


def as_vectors(layer: Tensor, pages: Tensor) -> Tensor:
    """Copy pages `[..., ]` of `layer [pages, t, h, d]` into float32 vectors `[..., r]`."""
    rows = layer.flatten(1).index_select(0, pages.reshape(-1))
    return rows.float().view(*pages.shape, -1)


def squared_error(block: Tensor, served: Tensor) -> Tensor:
    """`|x - x_hat|^2 / |x|^2` over the last axis; 0 for two zero blocks, infinity where only `x` is zero.

    Args:
        block, served: `[..., r]`, float32.
    """
    difference = torch.linalg.vector_norm(block - served, dim=-1).square()
    return relative(difference, torch.linalg.vector_norm(block, dim=-1).square())


def relative(difference: Tensor, norm: Tensor) -> Tensor:
    """`difference / norm`, both squared, where 0/0 is 0 and x/0 is infinity."""
    ratio = difference / norm
    return torch.where(difference == 0, torch.zeros_like(ratio), ratio)


def combine_layers(total: Tensor | None, layer: Tensor, count: int, aggregate: str) -> Tensor:
    """Fold one layer's squared errors into the total over `count` layers: mean (`"rms"`) or maximum (`"max"`)."""
    share = layer / count if aggregate == "rms" else layer
    if total is None:
        return share
    return total + share if aggregate == "rms" else torch.maximum(total, share)


def served_errors(
    kv: PagedKV,
    pages: Tensor,
    served_by: Tensor,
    aggregate: str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    batch: int = 64,
) -> tuple[Tensor, Tensor]:
    """Relative errors of K and V when block `pages[i]` is read from page `served_by[i]`, times its scales.

    Args:
        pages, served_by: page numbers, `[n]`.
        aggregate: `"rms"` or `"max"` over the layers.
        k_scale, v_scale: factors `[layers, n]` on the page read; None means 1.
        batch: blocks compared at a time, which bounds the workspace.

    Returns:
        Two float32 tensors `[n]`, on the CPU.
    """
    key_errors, value_errors = [], []
    for start in range(0, len(pages), batch):
        part = slice(start, start + batch)
        totals: list[Tensor | None] = [None, None]
        both = zip(kv.vectors(pages[part]), kv.vectors(served_by[part]), strict=True)
        for layer, (blocks, served) in enumerate(both):
            for side, scale in enumerate((k_scale, v_scale)):
                read = served[side]
                if scale is not None:
                    read = read * scale[layer, part, None].to(read.device)
                error = squared_error(blocks[side], read)
                totals[side] = combine_layers(totals[side], error, kv.num_layers, aggregate)
        key_errors.append(totals[0].sqrt())  # type: ignore[union-attr]
        value_errors.append(totals[1].sqrt())  # type: ignore[union-attr]
    if not key_errors:
        return torch.zeros(0), torch.zeros(0)
    return torch.cat(key_errors).cpu(), torch.cat(value_errors).cpu()
