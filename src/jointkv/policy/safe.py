"""The preset `safe`: a resident page serves as it stands, within a bound on every member's error."""

from __future__ import annotations

import torch
from torch import Tensor

from jointkv.policy import halves
from jointkv.policy.rule import PairStatistics, Rule


class Safe(Rule):
    """Groups blocks under pages that exist; the page with the smallest error serves, or else that of the nearest K."""

    preset = "safe"
    representative = "resident"

    def merge(self, pairs: PairStatistics, alike: Tensor) -> Tensor:
        score = pairs.key_cosine if pairs.error is None else -pairs.error
        assert score is not None
        return merge_resident(alike, score, pairs.valid)


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
    size = halves.power_of_two(count)
    allowed = halves.pad_pairs(allowed & valid[:, :, None] & valid[:, None, :], size)
    score = halves.pad_pairs(score, size).masked_fill(~allowed, halves.NO_MATCH)
    representative = torch.arange(size, device=valid.device).expand(positions, size).contiguous()
    half = 1
    while half < size:
        start = torch.arange(0, size, 2 * half, device=valid.device).view(1, -1, 1, 1)
        left, right = (representative.view(positions, -1, 2, half) - start).unbind(2)
        place = torch.arange(half, device=valid.device)
        right_leader = right - half
        pairs = halves.right_left(score, half)
        best, target = pairs.masked_fill(~(left == place)[:, :, None, :], halves.NO_MATCH).max(3)
        new = target.gather(2, right_leader)
        found = (best > halves.NO_MATCH).gather(2, right_leader)
        may_move = found & halves.right_left(allowed, half).gather(3, new[..., None]).squeeze(3)
        stuck = torch.zeros_like(best).scatter_add_(2, right_leader, (found & ~may_move).to(best.dtype))
        moves = may_move & ~((right_leader == place) & (stuck > 0))
        representative = (torch.stack((left, torch.where(moves, new, right)), 2) + start).view(positions, size)
        half *= 2
    return representative[:, :count]
