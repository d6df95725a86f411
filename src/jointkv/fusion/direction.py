"""Shared directions: the normalised mean of the members' unit vectors, each member keeping its own norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.blocks import PagedKV


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
    results: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], []]
    for blocks in kv.vectors(pages):
        for side, layers in enumerate((kv.keys, kv.values)):
            results[side].append(_one_layer(blocks[side], group_of, num_groups, layers[0]))
    keys, values = results
    return Directions(
        torch.stack([direction for direction, _, _ in keys]),
        torch.stack([direction for direction, _, _ in values]),
        torch.stack([scale for _, scale, _ in keys]),
        torch.stack([scale for _, scale, _ in values]),
        _over_layers([error for _, _, error in keys], aggregate),
        _over_layers([error for _, _, error in values], aggregate),
    )


def _one_layer(
    blocks: Tensor, group_of: Tensor, num_groups: int, pages: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    norm = torch.linalg.vector_norm(blocks, dim=-1, keepdim=True)
    unit = torch.where(norm > 0, blocks / norm, torch.zeros_like(blocks))
    total = blocks.new_zeros(num_groups, blocks.shape[-1]).index_add_(0, group_of, unit)
    direction = torch.nn.functional.normalize(total, dim=-1).to(pages.dtype)
    stored = direction.float()
    length = torch.linalg.vector_norm(stored, dim=-1, keepdim=True)[group_of]
    scale = torch.where(norm > 0, norm / length, torch.zeros_like(norm))
    read = stored[group_of] * scale
    error = (blocks - read).square().sum(-1)
    square = norm.squeeze(-1).square()
    error = torch.where(error == 0, torch.zeros_like(error), error / square)
    return direction.view(num_groups, *pages.shape[1:]).cpu(), scale.squeeze(-1).cpu(), error.cpu()


def _over_layers(errors: list[Tensor], aggregate: str) -> Tensor:
    stacked = torch.stack(errors)
    return (stacked.mean(0) if aggregate == "rms" else stacked.amax(0)).sqrt()
