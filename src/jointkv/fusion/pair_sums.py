"""Compares pairs of packed pages in one pass over their bytes: squared norms per layer, side and token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jointkv.core.blocks import (
    RESOLUTION,
    TINY,
    LayerAggregate,
    ServedErrors,
    aggregate_errors,
    checked_pages,
    lift_lost,
)
from jointkv.core.packed import PackedPages
from jointkv.core.transfer import to_host
from jointkv.errors import LayoutError
from jointkv.fusion.kernels import kernels_for

UNLIKE_NORMS = 1e4
MOST_FACTOR = 8.0
"""Norms that are further apart are left as they are."""


def pair_sums(pages: PackedPages, own: Tensor, other: Tensor) -> Tensor:
    """Squared norms of `own - other`, `own` and `other`, by a kernel where one can be had.

    Args:
        own, other: page numbers, `[n]`.

    Returns:
        float32 `[n, layers, 2, tokens, 3]` on the CPU; K is side 0. The difference is zero only of tokens that are
        equal, even if its square vanishes in float32: see `blocks.lift_lost`.

    Raises:
        IndexError: a page number is out of range.
        LayoutError: `own` and `other` are not two vectors of one length.
    """
    return start_pair_sums(pages, own, other)()


def start_pair_sums(pages: PackedPages, own: Tensor, other: Tensor) -> Callable[[], Tensor]:
    """As `pair_sums`, but nothing waits for the pages' device before the sums are asked for."""
    own, other = (checked_pages(pages, index) for index in (own, other))
    if own.shape != other.shape:
        raise LayoutError(f"pairs of {len(own)} and {len(other)} pages")
    kernels = kernels_for(pages.device.type)
    return to_host((kernels.pair_sums if kernels else pair_sums_reference)(pages, own, other))


def pair_sums_reference(pages: PackedPages, own: Tensor, other: Tensor) -> Tensor:
    """What `pair_sums` returns, in plain torch."""
    parts = [torch.zeros(0, pages.num_layers, 2, pages.block_size, 3)]
    for part in pages.batches(len(own)):
        sides = []
        for blocks, read in zip(pages.vectors(own[part]), pages.vectors(other[part]), strict=True):
            x, y = (vectors.unflatten(-1, (pages.block_size, -1)) for vectors in (blocks, read))
            apart = x - y
            difference, norm, read_norm = (vectors.square().sum(-1) for vectors in (apart, x, y))
            sides.append(torch.stack((lift_lost(difference, norm, apart), norm, read_norm), -1))
        parts.append(torch.stack(sides, 2).transpose(0, 1).cpu())
    return torch.cat(parts)


def pair_errors(sums: Tensor, aggregate: LayerAggregate) -> ServedErrors:
    """Relative errors when each `own` of `pair_sums` is read from its `other`; equal to `blocks.served_errors`."""
    difference, norm, _ = sums.unbind(-1)
    difference = difference.masked_fill((norm < TINY) & (difference > 0), torch.inf)
    by_layer = [part.transpose(0, 1).flatten(1, 2) for part in (difference, norm)]
    block, token = (error.view(-1, 2) for error in aggregate_errors(by_layer[0], by_layer[1], aggregate))
    return ServedErrors(block[:, 0], block[:, 1], token.amax(1))


def pair_cosines(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of the K blocks and of the V blocks, mean over layers, `[n]` each.

    A cosine is known to about 1e-7 times the ratio of the norms; beyond `UNLIKE_NORMS`, and at norm 0, it counts as 0.
    """
    difference, own, other = sums.sum(3).unbind(-1)
    inverse = own.clamp(min=TINY).rsqrt() * other.clamp(min=TINY).rsqrt()
    known = torch.minimum(own, other) * UNLIKE_NORMS**2 >= torch.maximum(own, other)
    key, value = ((own + other - difference) / 2 * inverse * known).mean(1).unbind(1)
    return key, value


def with_own_norms(sums: Tensor) -> tuple[Tensor, Tensor]:
    """What becomes of `sums` when `own` reads the direction of `other` with its own norm: a factor on K and one on V.

    Of every layer and side; 1 where the page as it stands is nearer. With norms `a` and `b` of `own` and `other`, which
    are `d` apart, the square of what is left is `a/b (d^2 - (1 - a/b)^2 b^2)`.

    Args:
        sums: from `pair_sums`.

    Returns:
        Sums of `own - factor * other`, `own` and `factor * other`, and the factors, `[n, layers, 2]`, above 0.
    """
    whole = sums.sum(3)
    factor = (whole[..., 1] / whole[..., 2]).sqrt()
    factor = torch.where((factor > 1 / MOST_FACTOR) & (factor < MOST_FACTOR), factor, 1.0)
    scaled = _scaled(sums, factor[..., None])
    nearer = scaled[..., 0].sum(3) < whole[..., 0]
    factor = torch.where(nearer, factor, 1.0)
    return torch.where((factor == 1)[..., None, None], sums, scaled), factor


def _scaled(sums: Tensor, factor: Tensor) -> Tensor:
    """Sums when `other` is multiplied by `factor [n, layers, 2, 1]`, which is not 1."""
    difference, own, other = sums.unbind(-1)
    apart = factor * difference + (1 - factor) * (own - factor * other)
    # Rounding must not make it 0, which stands for equal tokens.
    least = (RESOLUTION * own).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack((torch.maximum(apart, least), own, factor.square() * other), -1)
