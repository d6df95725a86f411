"""Shared directions: the normalised mean of the members' unit vectors, each member keeping its own norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.core.blocks import LayerAggregate, PagedKV, ServedErrors, as_vectors, block_errors

BATCH = 64
"""Blocks held in float32 at a time: few enough to stay in the cache. They are read twice instead of being kept."""


@dataclass(frozen=True)
class Directions:
    """Directions of `m` groups and the scales of their `n` members, for a layer group of `L` layers.

    Attributes:
        keys, values: `[L, m, t, h, d]`, unit norm up to the rounding of the pages' dtype.
        k_scale, v_scale: `[L, n]`: a member's norm over the norm of the stored direction.
        errors: of the members read back, `[n]`.
    """

    keys: Tensor
    values: Tensor
    k_scale: Tensor
    v_scale: Tensor
    errors: ServedErrors


def shared_directions(
    kv: PagedKV, pages: Tensor, group_of: Tensor, num_groups: int, aggregate: LayerAggregate
) -> Directions:
    """Compute the directions of the groups of blocks `pages [n]`, numbered by `group_of [n]`.

    The errors are those of what attention will read: directions rounded to the pages' dtype, times the scales, rounded.
    """
    pages, group_of = pages.to(kv.device), group_of.to(kv.device)
    key, value = (_one_side(layers, pages, group_of, num_groups, aggregate) for layers in (kv.keys, kv.values))
    errors = ServedErrors(key[2], value[2], torch.maximum(key[3], value[3]))
    return Directions(key[0], value[0], key[1], value[1], errors)


def _one_side(
    layers: Sequence[Tensor], pages: Tensor, group_of: Tensor, num_groups: int, aggregate: LayerAggregate
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Directions, scales, block errors and worst token errors of K or of V."""
    made = [_one_layer(layer, pages, group_of, num_groups) for layer in layers]
    directions, scales = (torch.stack(parts) for parts in zip(*made, strict=True))
    errors = []
    for start in range(0, len(pages), max(1, BATCH // len(layers))):
        part = slice(start, start + max(1, BATCH // len(layers)))
        blocks = torch.stack([as_vectors(layer, pages[part]) for layer in layers])
        read = directions[:, group_of[part]].flatten(2).float().mul_(scales[:, part, None])
        read = read.to(directions.dtype).float()
        errors.append(block_errors(blocks, read, layers[0].shape[1], aggregate))
    block, token = (torch.cat(parts) for parts in zip(*errors, strict=True))
    return directions.cpu(), scales.cpu(), block, token


def _one_layer(layer: Tensor, pages: Tensor, group_of: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Stored directions `[m, t, h, d]` and the members' scales `[n]`."""
    total = torch.zeros(num_groups, layer[0].numel(), device=layer.device)
    norms = []
    for start in range(0, len(pages), BATCH):
        part = slice(start, start + BATCH)
        blocks = as_vectors(layer, pages[part])
        norms.append(torch.linalg.vector_norm(blocks, dim=-1))
        inverse = torch.where(norms[-1] > 0, 1 / norms[-1], 0.0)
        broken = ~norms[-1].isfinite()
        if broken.any():  # out of the mean; its own error is no number, so it keeps its page
            blocks[broken], inverse[broken] = 0.0, 0.0
        total.index_add_(0, group_of[part], blocks.mul_(inverse[:, None]))
    norm = torch.cat(norms)
    direction = torch.nn.functional.normalize(total, dim=-1).to(layer.dtype)
    length = torch.linalg.vector_norm(direction, dim=-1, dtype=torch.float32)[group_of]
    scale = torch.where(norm > 0, norm / length, 0.0)
    return direction.view(num_groups, *layer.shape[1:]), scale
