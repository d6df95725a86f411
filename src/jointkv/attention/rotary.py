"""Keys at another position: rotary embeddings turn each pair of numbers by an angle that grows with the position.

Keys that were turned for position p and are turned by the angles of d again are keys of position p + d, whatever factor
the model scales them with (RoFormer, arXiv 2104.09864; linear, YaRN and Llama 3 scaling have other angles, no more).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.core.blocks import PagedKV
from jointkv.core.moved import Fills


@dataclass(frozen=True, eq=False)
class Rotary:
    """How one layer turns its keys.

    Attributes:
        frequencies: angle per token of each pair, float64 `[pairs]`; none where the layer turns nothing.
        interleaved: whether neighbours are a pair (GPT-J), rather than one number of each half (GPT-NeoX).
    """

    frequencies: Tensor
    interleaved: bool

    def turn(self, keys: Tensor, shift: Tensor) -> Tensor:
        """`keys [n, ..., d]`, each turned on by `shift [n]` tokens; computed in float32, in the dtype of the keys.

        Numbers behind the pairs are not turned (partial rotary embeddings).
        """
        pairs = len(self.frequencies)
        if not pairs:
            return keys
        angle = shift.to(torch.float64)[:, None] * self.frequencies
        angle = angle.view(len(shift), *(1,) * (keys.dim() - 2), pairs)
        cos, sin = angle.cos().float().to(keys.device), angle.sin().float().to(keys.device)
        one, two = self._pairs(keys[..., : 2 * pairs].float())
        turned = torch.stack((one * cos - two * sin, two * cos + one * sin), -1 if self.interleaved else -2)
        result = keys.clone()
        result[..., : 2 * pairs] = turned.flatten(-2).to(keys.dtype)
        return result

    def _pairs(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return numbers[..., 0::2], numbers[..., 1::2]
        one, two = numbers.chunk(2, -1)
        return one, two


def moved_blocks(kv: PagedKV, fills: Fills, rotary: Sequence[Rotary]) -> PagedKV:
    """The blocks that `fills [n]` describe, as pages 0 to n - 1: K turned to their new position, V as it is.

    Args:
        rotary: of each layer of `kv`.
    """
    token = torch.from_numpy(fills.offset)[:, None] + torch.arange(kv.block_size)
    first, second = torch.from_numpy(fills.first), torch.from_numpy(fills.second)
    page = torch.where(token < kv.block_size, first[:, None], second[:, None]).to(kv.device)
    token = (token % kv.block_size).to(kv.device)
    shift = torch.from_numpy(fills.shift)
    keys = [layer.turn(side[page, token], shift) for side, layer in zip(kv.keys, rotary, strict=True)]
    return PagedKV(keys, [side[page, token] for side in kv.values])
