"""How alike the blocks of a position are: one matrix product gives every cosine and every relative error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from jointkv.core.blocks import LayerAggregate, PagedKV, as_vectors
from jointkv.policy.rule import PairStatistics, Rule

BLOCKS_BYTES = 2 << 20
"""Blocks held in float32 at a time: small enough to stay in the last-level cache between copy and product."""

PAIRS_BYTES = 32 << 20
"""Size of one pair matrix at the most."""

TINY = 1e-30
"""Stands for a squared norm of zero: 0 / TINY is 0 and anything else over TINY exceeds every bound."""


def position_chunks(positions: int, blocks: int) -> Iterator[slice]:
    """Cut `positions` so that the pair matrices `[chunk, blocks, blocks]` stay small."""
    step = max(1, PAIRS_BYTES // (4 * blocks * blocks))
    for start in range(0, positions, step):
        yield slice(start, start + step)


def pair_statistics(kv: PagedKV, pages: Tensor, rule: Rule) -> PairStatistics:
    """Compare the blocks `pages [P, N]` (-1: none) within each position, as far as `rule` needs it."""
    index = pages.clamp(min=0).to(kv.device)
    valid = (pages >= 0).to(kv.device)
    cosines, errors = [], []
    for layers, threshold in ((kv.keys, rule.key_threshold), (kv.values, rule.value_threshold)):
        cosine, error = (
            torch.zeros(*pages.shape, pages.shape[1], device=kv.device) if needed else None
            for needed in (threshold is not None, rule.compares_errors)
        )
        if cosine is not None or error is not None:
            _accumulate(layers, index, valid, cosine, error, rule.across_layers)
        cosines.append(cosine)
        errors.append(error)
    worse = torch.maximum(errors[0], errors[1]) if errors[0] is not None and errors[1] is not None else None
    return PairStatistics(valid, cosines[0], cosines[1], worse)


def _accumulate(
    layers: Sequence[Tensor],
    index: Tensor,
    valid: Tensor,
    cosine: Tensor | None,
    error: Tensor | None,
    aggregate: LayerAggregate,
) -> None:
    """Add the layers' statistics to `cosine` and `error`, and clear `valid` where a norm is not finite; in place."""
    step = max(1, BLOCKS_BYTES // (4 * index.shape[1] * layers[0][0].numel()))
    gram = torch.empty(*index.shape, index.shape[1], device=index.device)
    for layer in layers:
        for start in range(0, len(index), step):
            blocks = as_vectors(layer, index[start : start + step])
            torch.bmm(blocks, blocks.transpose(1, 2), out=gram[start : start + step])
        norm = gram.diagonal(dim1=1, dim2=2).clone()
        valid &= norm.isfinite()
        if cosine is not None:
            inverse = norm.clamp(min=TINY).rsqrt()
            scaled = gram * inverse[:, :, None]
            cosine.addcmul_(scaled, inverse[:, None, :], value=1 / len(layers))
        if error is not None:
            squared = gram.mul_(-2).add_(norm[:, :, None]).add_(norm[:, None, :]).clamp_(min=0)
            inverse = 1 / norm[:, :, None].clamp(min=TINY)
            if aggregate == "rms":
                error.addcmul_(squared, inverse, value=1 / len(layers))
            else:
                torch.maximum(error, squared.mul_(inverse), out=error)
