"""How alike the blocks of a position are: one matrix product gives every cosine and every relative error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.blocks import PagedKV, as_vectors, combine_layers, relative
from jointkv.policy import FusionPolicy

WORKSPACE_BYTES = 8 << 20
"""Blocks held in float32 at a time: small enough to stay in the last-level cache between copy and product."""


@dataclass(frozen=True)
class PairStatistics:
    """Similarities of all pairs among `N` blocks at each of `P` positions; unused ones are None.

    Attributes:
        valid: `[P, N]`; False where there is no block, or it holds NaN or infinity.
        key_cosine, value_cosine: `[P, N, N]`, mean over layers.
        key_error, value_error: `[P, N, N]`; entry `[i, j]` is the squared relative error of block `i` served by
            block `j` as it stands. Rounded in float32 (about 1e-6), so the final check is made on the difference.
    """

    valid: Tensor
    key_cosine: Tensor | None = None
    value_cosine: Tensor | None = None
    key_error: Tensor | None = None
    value_error: Tensor | None = None

    @property
    def finite(self) -> Tensor:
        return self.valid


def position_chunks(kv: PagedKV, positions: int, blocks: int) -> Iterator[slice]:
    """Cut `positions` so that one layer's K blocks of a chunk, and its pair matrices, fit the workspace."""
    per_position = 4 * blocks * max(kv.keys[0][0].numel(), blocks)
    step = max(1, WORKSPACE_BYTES // per_position)
    for start in range(0, positions, step):
        yield slice(start, start + step)


def pair_statistics(kv: PagedKV, pages: Tensor, policy: FusionPolicy, group: int) -> PairStatistics:
    """Compare the blocks `pages [P, N]` (-1: none) within each position, as far as `policy` needs it."""
    needs_errors = (
        policy.representative == "resident" and policy.threshold("max_relative_error", group) is not None
    )
    sides = [
        (kv.keys, policy.threshold("key_threshold", group) is not None),
        (kv.values, policy.threshold("value_threshold", group) is not None),
    ]
    index = pages.clamp(min=0).to(kv.device)
    valid = (pages >= 0).to(kv.device)
    cosines: list[Tensor | None] = [None, None]
    errors: list[Tensor | None] = [None, None]
    for side, (layers, needs_cosine) in enumerate(sides):
        if not (needs_cosine or needs_errors):
            continue
        for layer in layers:
            blocks = as_vectors(layer, index)
            gram = blocks @ blocks.transpose(1, 2)
            norm = gram.diagonal(dim1=1, dim2=2)
            valid = valid & norm.isfinite()
            if needs_cosine:
                inverse = torch.where(norm > 0, norm.rsqrt(), torch.zeros_like(norm))
                cosine = gram * inverse[:, :, None] * inverse[:, None, :]
                cosines[side] = combine_layers(cosines[side], cosine, kv.num_layers, "rms")
            if needs_errors:
                difference = (norm[:, :, None] + norm[:, None, :] - 2 * gram).clamp(min=0)
                error = relative(difference, norm[:, :, None])
                errors[side] = combine_layers(errors[side], error, kv.num_layers, policy.across_layers)
    return PairStatistics(valid, cosines[0], cosines[1], errors[0], errors[1])
