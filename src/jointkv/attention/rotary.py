"""Keys at another position: rotary embeddings turn each pair of numbers by an angle that grows with the position.

Keys that were turned for position p and are turned by the angles of d again are keys of position p + d, whatever factor
the model scales them with (RoFormer, arXiv 2104.09864; linear, YaRN and Llama 3 scaling have other angles, no more).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.core.blocks import PagedKV
from jointkv.core.moved import Fills

Angles = tuple[Tensor, Tensor]
"""Cosine and sine of what the pairs of each key are turned by, float32 `[n, pairs]` each."""


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
        return self.turn_by(keys, self.angles(shift))

    def angles(self, shift: Tensor) -> Angles:
        """Of `shift [n]` tokens; layers with equal frequencies share them."""
        angle = shift.to(torch.float64)[:, None] * self.frequencies
        return angle.cos().float(), angle.sin().float()

    def turn_by(self, keys: Tensor, angles: Angles) -> Tensor:
        """`keys [n, ..., d]`, each turned by its angles, as `turn` does."""
        pairs = len(self.frequencies)
        if not pairs:
            return keys
        shape = (len(keys), *(1,) * (keys.dim() - 2), pairs)
        cos, sin = (part.view(shape).to(keys.device) for part in angles)
        numbers = keys.float()
        turned = torch.empty_like(numbers)
        turned[..., 2 * pairs :] = numbers[..., 2 * pairs :]
        (one, two), (to_one, to_two) = self._pairs(numbers), self._pairs(turned)
        torch.mul(one, cos, out=to_one).addcmul_(two, sin, value=-1)
        torch.mul(two, cos, out=to_two).addcmul_(one, sin)
        return turned.to(keys.dtype)

    def _pairs(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the first and of the second numbers of all pairs."""
        pairs = len(self.frequencies)
        if self.interleaved:
            return numbers[..., 0 : 2 * pairs : 2], numbers[..., 1 : 2 * pairs : 2]
        return numbers[..., :pairs], numbers[..., pairs : 2 * pairs]


NOT_TURNED = Rotary(torch.zeros(0, dtype=torch.float64), False)
"""A layer whose keys do not depend on their position."""


class Turning:
    """Keys of tokens or pages turned on by `shift [n]` tokens, layer by layer; layers that turn alike share angles.

    Args:
        rotary: of each layer.
        device: of the keys.
    """

    def __init__(self, rotary: Sequence[Rotary], shift: Tensor, device: torch.device | None = None) -> None:
        self._rotary, self._shift = rotary, shift
        made: dict[bytes, Angles] = {}
        self._angles = []
        for layer in rotary:
            known = layer.frequencies.numpy().tobytes()
            if known not in made:
                cos, sin = layer.angles(shift)
                made[known] = cos.to(device), sin.to(device)
            self._angles.append(made[known])

    def __call__(self, layer: int, keys: Tensor) -> Tensor:
        """`keys [n, ..., h, d]` of `layer`, in their dtype; the same tensor where it turns nothing."""
        return self._rotary[layer].turn_by(keys, self._angles[layer])

    def of(self, layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        """`Rotary.turn` of `layer`, whose angles are there already for the same tensor of shifts."""
        return lambda keys, shift: self(layer, keys) if shift is self._shift else self._rotary[layer].turn(keys, shift)


def that_turns(before: Tensor, after: Tensor, shift: Tensor, candidates: Sequence[Rotary]) -> Rotary | None:
    """Which of `candidates` turns the keys `before [n, ..., d]` to `after`, which stand `shift [n]` tokens later.

    What a model says of itself is one thing; that K which it has computed are so is another. None where no candidate
    leaves mere rounding.
    """
    tolerance = 10 * torch.finfo(before.dtype).eps
    for candidate in candidates:
        fits = 2 * len(candidate.frequencies) <= before.shape[-1]
        if fits and far(candidate.turn(before.float(), shift), after) <= _slack(candidate, shift, tolerance):
            return candidate
    return None


def far(one: Tensor, two: Tensor) -> float:
    """Relative error of the whole."""
    return float((one.float() - two.float()).norm() / two.float().norm().clamp(min=1e-30))


def _slack(candidate: Rotary, shift: Tensor, tolerance: float) -> float:
    """Models compute angles in float32, which at long distances are off by more than keys are."""
    if not len(candidate.frequencies):
        return tolerance
    return tolerance + float(shift.max() * candidate.frequencies.max()) * torch.finfo(torch.float32).eps


def moved_blocks(kv: PagedKV, fills: Fills, rotary: Sequence[Rotary]) -> PagedKV:
    """The blocks that `fills [n]` describe, as pages 0 to n - 1: K turned to their new position, V as it is.

    Args:
        rotary: of each layer of `kv`.
    """
    size, token = kv.block_size, torch.from_numpy(fills.offset)[:, None] + torch.arange(kv.block_size)
    first, second = torch.from_numpy(fills.first), torch.from_numpy(fills.second)
    page = torch.where(token < size, first[:, None], second[:, None])
    place = (page * size + token % size).flatten().to(kv.device)
    shift = torch.from_numpy(fills.shift)

    def read(side: Tensor) -> Tensor:
        return side.view(-1, *side.shape[2:]).index_select(0, place).view(len(fills), *side.shape[1:])

    keys = [layer.turn(read(side), shift) for side, layer in zip(kv.keys, rotary, strict=True)]
    return PagedKV(keys, [read(side) for side in kv.values])
