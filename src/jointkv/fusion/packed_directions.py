"""Shared directions of packed pages: how alike the blocks of a batch are, and a page with the mean of some of them."""

from __future__ import annotations

import torch
from torch import Tensor

from jointkv.core.blocks import TINY
from jointkv.core.packed import PackedPages


def packed_cosines(pages: PackedPages, numbers: Tensor) -> Tensor:
    """Cosines of the K blocks and of the V blocks of all pairs of the pages `numbers [n]`, mean over layers.

    Returns:
        float32 `[2, n, n]` on the CPU; not a number for a page with a norm that is none.
    """
    found = torch.zeros(2, len(numbers), len(numbers), device=pages.device)
    for layer in range(pages.num_layers):
        for side, blocks in enumerate(_layer(pages, layer, numbers)):
            gram = blocks @ blocks.T
            norm = gram.diagonal().clone()
            inverse = torch.where(norm.isfinite(), norm.clamp(min=TINY).rsqrt(), torch.nan)
            found[side] += gram * inverse[:, None] * inverse / pages.num_layers
    return found.cpu()


def write_direction(pages: PackedPages, page: int, numbers: Tensor) -> None:
    """Have `page` hold the direction that the blocks of the pages `numbers [n]` share (paper, Algorithm 1); in place.

    In every layer the normalised mean of their unit vectors, of K and of V, at the mean of their norms: factors with
    which they keep their own are then near 1, whatever the dtype of the pages.

    Raises:
        ValueError: `page` is one of them; what somebody reads is never written.
    """
    if bool((numbers == page).any()):
        raise ValueError(f"page {page} is read by a block whose direction it would hold")
    for layer, held in enumerate(pages.layers):
        for elements, blocks in zip(pages.order, _layer(pages, layer, numbers), strict=True):
            norms = torch.linalg.vector_norm(blocks, dim=1)
            units = blocks / norms.clamp(min=TINY)[:, None]
            mean = torch.nn.functional.normalize(units.sum(0), dim=0) * norms.mean()
            held[page, elements] = mean.to(held.dtype)


def _layer(pages: PackedPages, layer: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """K and V blocks of one layer, float32 `[n, elements]` each."""
    one = PackedPages([pages.layers[layer]], pages.token_of, pages.is_value)
    keys, values = one.vectors(numbers)
    return keys[0], values[0]
