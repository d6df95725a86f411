"""The preset `paper` (arXiv 2601.03067, Algorithm 1): keys decide, and the mean direction of a group serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from jointkv.errors import InvalidPolicy
from jointkv.policy import halves
from jointkv.policy.rule import PairStatistics, Rule


class Paper(Rule):
    """Groups blocks under shared directions by cosine; every member keeps its own norms."""

    preset = "paper"
    representative = "direction"
    defaults: ClassVar[Mapping[str, Any]] = {
        "similarity": "key",
        "key_threshold": 0.75,
        "max_relative_error": None,
        "max_token_error": None,
        "layer_groups": "per_layer",
        "skip_first_layers": 2,
        "skip_last_layers": 2,
    }
    shares_directions = True

    @classmethod
    def check(cls, fields: Mapping[str, Any]) -> None:
        if fields["key_threshold"] is None:
            raise InvalidPolicy("key_threshold: directions group blocks by it; set it, such as to 0.9")
        if fields["similarity"] == "key_value" and fields["value_threshold"] is None:
            raise InvalidPolicy("value_threshold: directions need it, or similarity='key'")
        if fields["scope"] == "both":
            raise InvalidPolicy(
                "scope: 'both' does not go with directions, which overwrite pages; set 'batch' or 'chunk'"
            )

    def merge(self, pairs: PairStatistics, alike: Tensor) -> Tensor:
        assert pairs.key_cosine is not None
        thresholds = (self.key_threshold or 0.0, self.value_threshold or 0.0)
        return merge_directions(pairs.key_cosine, pairs.value_cosine, pairs.valid, *thresholds)


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
    size = halves.power_of_two(count)
    both = valid[:, :, None] & valid[:, None, :]
    grams = [
        (halves.pad_pairs(gram.masked_fill(~both, 0.0), size), threshold)
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
        best, target = cosines[0].masked_fill_(~open_pairs, halves.NO_MATCH).max(3)
        joined = torch.where(best > halves.NO_MATCH, target, place + half)
        group = torch.cat((group[:, 0::2], joined.gather(2, group[:, 1::2])), 2)
        half *= 2
    return group.view(positions, size)[:, :count]


def _right_left_cosines(gram: Tensor, group: Tensor, half: int) -> Tensor:
    """Cosines of the summed unit vectors of right groups with those of left groups: `[P, subtrees / 2, half, half]`.

    `group [P, subtrees, half]` says which group of its subtree each block is in.
    """
    weights = torch.zeros(*group.shape, half, dtype=gram.dtype, device=gram.device)
    weights.scatter_(3, group[..., None], 1.0)
    squared_norm = (halves.subtrees(gram, half) @ weights).mul_(weights).sum(2, keepdim=True)
    weights.mul_(squared_norm.clamp_(min=1e-12).rsqrt_())
    return weights[:, 1::2].transpose(2, 3) @ halves.right_left(gram, half) @ weights[:, 0::2]
