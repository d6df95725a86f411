"""The merging step of tree Fast-Fusion (paper, Algorithm 1), on pair matrices instead of the blocks themselves.

Every inner product that a tree over `N` blocks can ask for is a sum of entries of one `N x N` Gram matrix: the
direction of a group is a sum of unit vectors, so the cosine of two groups needs no further pass over the data.
Halves are merged bottom-up, all subtrees and positions of a level at once: `log2 N` levels, no loop over blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_MATCH = -torch.inf


def merge_resident(allowed: Tensor, score: Tensor, valid: Tensor) -> Tensor:
    """Group blocks under resident representatives.

    A right representative joins the left one that serves it best; of its members, those that the new
    representative may serve move along. The rest stay, and then the old representative stays with them, so no
    member is ever served by a block it is not allowed to be served by.

    Args:
        allowed: `[P, N, N]` bool; `[i, j]`: block `j` may serve block `i`.
        score: `[P, N, N]`; larger is better.
        valid: `[P, N]` bool.

    Returns:
        `[P, N]` long: the representative of each block, itself where it has none.
    """
    positions, count = valid.shape
    size = _next_power_of_two(count)
    allowed = _pad_pairs(allowed & valid[:, :, None] & valid[:, None, :], size)
    score = _pad_pairs(score, size).masked_fill(~allowed, NO_MATCH)
    representative = torch.arange(size, device=valid.device).expand(positions, size).contiguous()
    half = 1
    while half < size:
        shape = (positions, size // (2 * half), 2, half)
        local = representative.view(shape) - _subtree_starts(size, 2 * half, valid.device).view(1, -1, 1, 1)
        left, right = local[:, :, 0], local[:, :, 1]
        left_leads = left == torch.arange(half, device=valid.device)
        right_leader = right - half
        pairs = _right_left(score, half)
        best, target = pairs.masked_fill(~left_leads[:, :, None, :], NO_MATCH).max(3)
        new = target.gather(2, right_leader)
        found = (best > NO_MATCH).gather(2, right_leader)
        may_move = found & _right_left(allowed, half).gather(3, new[..., None]).squeeze(3)
        stuck = torch.zeros_like(best).scatter_add_(2, right_leader, (found & ~may_move).to(best.dtype))
        leads = right_leader == torch.arange(half, device=valid.device)
        moves = may_move & ~(leads & (stuck > 0))
        local = torch.stack((left, torch.where(moves, new, right)), 2)
        representative = local + _subtree_starts(size, 2 * half, valid.device).view(1, -1, 1, 1)
        representative = representative.view(positions, size)
        half *= 2
    return representative[:, :count]


def merge_directions(
    key_gram: Tensor, value_gram: Tensor | None, valid: Tensor, key_threshold: float, value_threshold: float
) -> Tensor:
    """Group blocks under shared directions, weighted by how many blocks each side stands for (Algorithm 1).

    Args:
        key_gram, value_gram: cosines `[P, N, N]`; without `value_gram`, keys decide alone.
        valid: `[P, N]` bool.

    Returns:
        `[P, N]` long: the first block of the group, for each block.
    """
    positions, count = valid.shape
    size = _next_power_of_two(count)
    both = valid[:, :, None] & valid[:, None, :]
    grams = [
        (_pad_pairs(gram.masked_fill(~both, 0.0), size), threshold)
        for gram, threshold in ((key_gram, key_threshold), (value_gram, value_threshold))
        if gram is not None
    ]
    present = torch.nn.functional.pad(valid, (0, size - count))
    # Groups are numbered by their first block, counted from the start of the subtree: [P, subtrees, half].
    group = torch.zeros(positions, size, 1, dtype=torch.long, device=valid.device)
    half = 1
    while half < size:
        place = torch.arange(half, device=valid.device)
        leads = (group == place) & present.view(positions, -1, half)
        open_pairs = leads[:, 1::2, :, None] & leads[:, 0::2, None, :]
        cosines = [_right_left_cosines(gram, group, half) for gram, _ in grams]
        for cosine, (_, threshold) in zip(cosines, grams, strict=True):
            open_pairs &= cosine >= threshold
        best, target = cosines[0].masked_fill_(~open_pairs, NO_MATCH).max(3)
        joined = torch.where(best > NO_MATCH, target, place + half)
        group = torch.cat((group[:, 0::2], joined.gather(2, group[:, 1::2])), 2)
        half *= 2
    return group.view(positions, size)[:, :count]


def _right_left_cosines(gram: Tensor, group: Tensor, half: int) -> Tensor:
    """Cosines of the summed unit vectors of right groups with those of left groups: `[P, subtrees / 2, half, half]`.

    `group [P, subtrees, half]` says which group of its subtree each block is in.
    """
    weights = torch.zeros(*group.shape, half, dtype=gram.dtype, device=gram.device)
    weights.scatter_(3, group[..., None], 1.0)
    squared_norm = (_diagonal_subtrees(gram, half) @ weights).mul_(weights).sum(2, keepdim=True)
    weights.mul_(squared_norm.clamp_(min=1e-12).rsqrt_())
    return weights[:, 1::2].transpose(2, 3) @ _right_left(gram, half) @ weights[:, 0::2]


def _diagonal_subtrees(pairs: Tensor, width: int) -> Tensor:
    """The `width x width` blocks on the diagonal: `[P, N, N] -> [P, N / width, width, width]`."""
    positions, size, _ = pairs.shape
    split = pairs.view(positions, size // width, width, size // width, width)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _right_left(pairs: Tensor, half: int) -> Tensor:
    """Entries (right block, left block) of every subtree of width `2 * half`: `[P, subtrees, half, half]`."""
    return _diagonal_subtrees(pairs, 2 * half)[:, :, half:, :half]


def _subtree_starts(size: int, width: int, device: torch.device) -> Tensor:
    return torch.arange(0, size, width, device=device)


def _pad_pairs(pairs: Tensor, size: int) -> Tensor:
    extra = size - pairs.shape[1]
    return torch.nn.functional.pad(pairs, (0, extra, 0, extra)) if extra else pairs


def _next_power_of_two(count: int) -> int:
    return 1 << max(0, (count - 1).bit_length())
