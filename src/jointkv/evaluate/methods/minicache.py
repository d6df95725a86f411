"""Cross-layer merging: MiniCache, arXiv 2405.14366."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.dense import LayerStates, layer_states, nbytes_of
from jointkv.evaluate.holding.held import HeldBatch, RebuiltBatch
from jointkv.evaluate.methods.base import Method

UPPER = 0.6
"""Weight of the upper layer in the interpolation: `t` of the paper."""
RETAINED = 0.05
"""Share of tokens, those whose directions differ most, that keep both layers as they are: the paper's gamma."""
FLAT = 1e-4
"""Least sine of an angle to interpolate along."""


class MiniCache(Method):
    """Pairs of adjacent layers, from the top down, keep one direction per token and head, and their own norms.

    The direction is the spherical interpolation of the two (eq. 3 of the paper). Retained tokens are counted, where
    the paper puts a threshold on the angle, so that the bytes are the same for every request.
    """

    name = "minicache"
    description = "adjacent layers share an interpolated direction and keep their norms (MiniCache)"
    levels = (0.25, 0.5, 0.75)
    level_means = "share of layers merged, from the top (the paper: 0.5)"
    allowed = "0 to 1"

    def allows(self, level: float) -> bool:
        return 0 <= level <= 1

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        return MergedBatch(batch, int(level * len(batch.dense[0].layers) / 2))


@dataclass(frozen=True)
class MergedPair:
    """One of K and V of two adjacent layers of one request of `n` tokens.

    Attributes:
        direction: unit vectors of the merged tokens, `[h, n - m, d]`.
        norms: `[2, h, n - m]`, lower layer first.
        retained: places of the tokens that are not merged, int32 `[m]`.
        kept: both layers at these places, `[2, h, m, d]`.
    """

    direction: Tensor
    norms: Tensor
    retained: Tensor
    kept: Tensor

    @property
    def nbytes(self) -> int:
        return self.direction.nbytes + self.norms.nbytes + self.retained.nbytes + self.kept.nbytes

    def read(self) -> Tensor:
        """Both layers, `[2, h, n, d]`."""
        merged = self.direction * self.norms[..., None]
        tokens = merged.shape[2] + len(self.retained)
        is_merged = _complement(self.retained, tokens)
        states = merged.new_empty(*merged.shape[:2], tokens, merged.shape[3])
        states[:, :, is_merged] = merged
        states[:, :, ~is_merged] = self.kept
        return states


def merge_pair(lower: Tensor, upper: Tensor) -> MergedPair:
    """Merge the states `[1, h, n, d]` of two adjacent layers."""
    both = torch.cat((lower, upper))
    tiny = torch.finfo(both.dtype).tiny
    norms = both.norm(dim=-1)
    units = both / norms.clamp(min=tiny)[..., None]
    angle = (units[0] * units[1]).sum(-1).clamp(-1, 1).arccos()
    retained = angle.mean(0).topk(round(RETAINED * both.shape[2])).indices.sort().values
    is_merged = _complement(retained, both.shape[2])
    direction = _interpolated(units[:, :, is_merged], angle[:, is_merged])
    return MergedPair(direction, norms[:, :, is_merged], retained.int(), both[:, :, retained])


def _interpolated(units: Tensor, angle: Tensor) -> Tensor:
    """Spherical interpolation of `units [2, h, n, d]` that are `angle [h, n]` apart, `[h, n, d]`."""
    shares = torch.tensor([1 - UPPER, UPPER]).to(units)[:, None, None]
    # Equal directions have no arc between them and opposite ones no shortest; a plain mean stands in.
    flat = angle.sin() < FLAT
    weights = torch.where(flat, shares, (shares * angle).sin() / angle.sin().masked_fill(flat, 1))
    return torch.nn.functional.normalize((weights[..., None] * units).sum(0), dim=-1)


def _complement(places: Tensor, length: int) -> Tensor:
    """False at `places`, True elsewhere: bool `[length]`."""
    return torch.ones(length, dtype=torch.bool, device=places.device).index_fill(0, places.long(), False)


class MergedBatch(RebuiltBatch):
    """The lower layers as they are, the upper ones in merged pairs."""

    counted = "tensors"

    def __init__(self, batch: Batch, pairs: int) -> None:
        super().__init__(batch.model, batch.lengths)
        self._whole: list[LayerStates] = []
        self._pairs: list[list[tuple[MergedPair, MergedPair]]] = []
        for cache in batch.dense:
            states = layer_states(cache)
            first = len(states) - 2 * pairs
            self._whole.append([(k.clone(), v.clone()) for k, v in states[:first]])
            self._pairs.append(
                [
                    (merge_pair(lower[0], upper[0]), merge_pair(lower[1], upper[1]))
                    for lower, upper in zip(states[first::2], states[first + 1 :: 2], strict=True)
                ]
            )
        whole = sum(nbytes_of(states) for states in self._whole)
        self.nbytes = whole + sum(k.nbytes + v.nbytes for pairs_held in self._pairs for k, v in pairs_held)

    def rebuild(self, request: int) -> LayerStates:
        states = list(self._whole[request])
        for keys, values in self._pairs[request]:
            states += [(k[None], v[None]) for k, v in zip(keys.read(), values.read(), strict=True)]
        return states
