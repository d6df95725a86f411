"""Shared directions: the normalised mean of the members' unit vectors, each member keeping its own norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.blocks import PagedKV, as_vectors, relative


@dataclass(frozen=True)
class Directions:
    """Directions of `m` groups and the scales of their `n` members, for a layer group of `L` layers.

    Attributes:
        keys, values: `[L, m, t, h, d]`, unit norm up to the rounding of the pages' dtype.
        k_scale, v_scale: `[L, n]`: a member's norm over the norm of the stored direction.
        key_error, value_error: `[n]`: relative errors of the members read back, over the layers.
    """

    keys: Tensor
    values: Tensor
    k_scale: Tensor
    v_scale: Tensor
    key_error: Tensor
    value_error: Tensor


def shared_directions(
    kv: PagedKV, pages: Tensor, group_of: Tensor, num_groups: int, aggregate: str
) -> Directions:
    """Compute the directions of the groups of blocks `pages [n]`, numbered by `group_of [n]`.

    The errors are those of what will be stored: directions rounded to the pages' dtype, times the scales.
    """
    group_of = group_of.to(kv.device)
    sides: list[list[tuple[Tensor, Tensor, Tensor]]] = [
        [_one_layer(layer, pages.to(kv.device), group_of, num_groups) for layer in layers]
        for layers in (kv.keys, kv.values)
    ]
    keys, values = sides
    return Directions(
        torch.stack([direction for direction, _, _ in keys]),
        torch.stack([direction for direction, _, _ in values]),
        torch.stack([scale for _, scale, _ in keys]),
        torch.stack([scale for _, scale, _ in values]),
        _over_layers([error for _, _, error in keys], aggregate),
        _over_layers([error for _, _, error in values], aggregate),
    )


def _one_layer(
    layer: Tensor, pages: Tensor, group_of: Tensor, num_groups: int, *, batch: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Stored directions `[m, t, h, d]`, scales `[n]` and squared errors `[n]` of one layer's K or V.

    Blocks are read twice, a cache-sized batch at a time, instead of being kept in float32.
    """
    parts = [slice(start, start + batch) for start in range(0, len(pages), batch)]
    total = torch.zeros(num_groups, layer[0].numel(), device=layer.device)
    norms = []
    for part in parts:
        blocks = as_vectors(layer, pages[part])
        norms.append(torch.linalg.vector_norm(blocks, dim=-1))
        inverse = torch.where(norms[-1] > 0, 1 / norms[-1], 0.0)
        total.index_add_(0, group_of[part], blocks.mul_(inverse[:, None]))
    norm = torch.cat(norms)
    direction = torch.nn.functional.normalize(total, dim=-1).to(layer.dtype)
    length = torch.linalg.vector_norm(direction, dim=-1, dtype=torch.float32)[group_of]
    scale = torch.where(norm > 0, norm / length, 0.0)
    errors = []
    for part in parts:
        read = direction.index_select(0, group_of[part]).float().mul_(scale[part, None])
        errors.append(torch.linalg.vector_norm(read.sub_(as_vectors(layer, pages[part])), dim=-1).square())
    error = relative(torch.cat(errors), norm.square())
    return direction.view(num_groups, *layer.shape[1:]).cpu(), scale.cpu(), error.cpu()


def _over_layers(errors: list[Tensor], aggregate: str) -> Tensor:
    stacked = torch.stack(errors)
    return (stacked.mean(0) if aggregate == "rms" else stacked.amax(0)).sqrt()
