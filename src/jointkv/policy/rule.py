"""What a method of fusion is: what it compares, which pairs it allows, how it groups them and what then serves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from jointkv.core.blocks import LayerAggregate

GRAM_SLACK = 1e-5
"""Room for float32 rounding when squared errors come from a Gram matrix; the bound itself is checked exactly."""

NOT_ASKED = (None, None)
"""In place of cosines that were compared with the thresholds before."""

Array = TypeVar("Array", Tensor, NDArray[Any])


@dataclass(frozen=True)
class PairStatistics:
    """Similarities of all pairs among `N` blocks at each of `P` positions; those that a rule does not ask for are None.

    Attributes:
        valid: `[P, N]`; False where there is no block, or it holds NaN or infinity.
        key_cosine, value_cosine: `[P, N, N]`, mean over layers.
        error: `[P, N, N]`; entry `[i, j]` is the squared relative error of block `i` served by block `j` as it
            stands, the larger one of K and V. Rounded in float32 (about 1e-6), so the final check is made on the
            difference itself.
    """

    valid: Tensor
    key_cosine: Tensor | None = None
    value_cosine: Tensor | None = None
    error: Tensor | None = None

    def take(self, lines: Tensor) -> PairStatistics:
        """The positions that the mask `lines [P]` picks."""
        parts = (self.key_cosine, self.value_cosine, self.error)
        return PairStatistics(self.valid[lines], *(None if part is None else part[lines] for part in parts))


@dataclass(frozen=True)
class Rule(ABC):
    """One method of fusion under the thresholds that a policy has for one layer group; see `FusionPolicy` for them.

    A method is a subclass in a file of its own, registered in `jointkv.policy.base.METHODS`.

    Attributes:
        preset: name of the policy that has the method's defaults.
        representative: the value of `FusionPolicy.representative` that asks for the method.
        defaults: fields of the preset, where they differ from those of `FusionPolicy`.
        shares_directions: members read a direction made of all of them, with their own norms; else a resident page
            as it stands.
    """

    preset: ClassVar[str]
    representative: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    shares_directions: ClassVar[bool] = False

    key_threshold: float | None
    value_threshold: float | None
    max_relative_error: float | None
    max_token_error: float | None
    across_layers: LayerAggregate

    @classmethod  # noqa: B027
    def check(cls, fields: Mapping[str, Any]) -> None:
        """Raises InvalidPolicy where `fields` of a policy, each valid by itself, do not go with the method."""

    @abstractmethod
    def merge(self, pairs: PairStatistics, alike: Tensor) -> Tensor:
        """The leader of each block's group, `[P, N]` long, itself where it has none.

        Args:
            pairs: what `compares_errors` and the thresholds ask for.
            alike: `[P, N, N]` bool; `[i, j]`: block `j` may serve block `i`.
        """

    @property
    def compares_cosines(self) -> bool:
        """Whether cosines of K or of V are asked for: those of a side that has a threshold."""
        return self.key_threshold is not None or self.value_threshold is not None

    @property
    def compares_errors(self) -> bool:
        """Whether grouping asks for the errors of pairs."""
        return self.max_relative_error is not None and not self.shares_directions

    @property
    def signature_limit(self) -> float:
        """The largest mean squared distance of unit blocks, K and V, of a pair that could be allowed."""
        key, value = self.key_threshold, self.value_threshold
        limits = []
        if self.max_relative_error is not None:
            # |x - y|^2 / |x|^2 >= 1 - c^2, and 2 - 2c <= 2 (1 - c^2) / (1 + c).
            limits.append(2 * self.max_relative_error**2)
        if key is not None:
            limits.append(((2 - 2 * key) + (4.0 if value is None else 2 - 2 * value)) / 2)
        return min(limits)

    @property
    def key_limit(self) -> float:
        """As `signature_limit`, of K alone."""
        by_cosine = 4.0 if self.key_threshold is None else 2 - 2 * self.key_threshold
        return by_cosine if self.max_relative_error is None else min(by_cosine, 2 * self.max_relative_error**2)

    def group(self, pairs: PairStatistics) -> Tensor:
        """The leader of each block's group, `[P, N]` long; a block that fits nowhere leads itself."""
        alike = self._alike(pairs)
        leader = torch.arange(alike.shape[1], device=alike.device).expand(alike.shape[:2]).contiguous()
        # Where no earlier block may serve a later one there is nothing to merge: most positions of unrelated traffic.
        lines = alike.tril(-1).flatten(1).any(1)
        if lines.any():
            leader[lines] = self.merge(pairs.take(lines), alike[lines])
        return leader

    def allows(self, errors: tuple[Array, Array, Array], cosines: tuple[Array | None, Array | None]) -> Array:
        """Which of `n` measured pairs may be served, bool `[n]`: the one place that compares them with the thresholds.

        Args:
            errors: relative errors of K, of V and of the worst token, `[n]` each, of what is to be read. A NaN is never
                allowed, nor an infinite error of a whole block.
            cosines: of the K and of the V blocks, mean over layers, `[n]` each; None is not asked.
        """
        key, value, token = errors
        block_bound, token_bound = (
            math.inf if bound is None else bound for bound in (self.max_relative_error, self.max_token_error)
        )
        allowed = (key < math.inf) & (value < math.inf) & (token <= token_bound)
        return self._with_cosines(allowed & (key <= block_bound) & (value <= block_bound), cosines)

    def ratio(self, errors: Sequence[ArrayLike]) -> NDArray[np.float64]:
        """The largest error over its bound of each of `n` measured pairs, `[n]`: above 1 is beyond the bounds.

        Args:
            errors: as in `allows`. NaN counts as infinite; at a bound of 0 only an error of 0 is within it. Without a
                bound every error is.
        """
        bounds = (self.max_relative_error, self.max_relative_error, self.max_token_error)
        with np.errstate(divide="ignore", invalid="ignore"):
            over = [
                np.where(np.asarray(error, np.float64) == 0, 0.0, np.asarray(error, np.float64) / bound)
                for error, bound in zip(errors, bounds, strict=True)
                if bound is not None
            ]
        return np.nan_to_num(np.maximum.reduce(over or [np.zeros(np.shape(errors[0]))]), nan=np.inf, posinf=np.inf)

    def _with_cosines(self, allowed: Array, cosines: tuple[Array | None, Array | None]) -> Array:
        for cosine, threshold in zip(cosines, (self.key_threshold, self.value_threshold), strict=True):
            if cosine is not None and threshold is not None:
                allowed = allowed & (cosine >= threshold)
        return allowed

    def _alike(self, pairs: PairStatistics) -> Tensor:
        """Which pairs pass every test so far: `[P, N, N]` bool; entry `[i, j]`: block `j` may serve block `i`."""
        valid = pairs.valid[:, :, None] & pairs.valid[:, None, :]
        alike = self._with_cosines(valid, (pairs.key_cosine, pairs.value_cosine))
        if pairs.error is not None and self.max_relative_error is not None:
            alike = alike & (pairs.error <= self.max_relative_error**2 + GRAM_SLACK)
        return alike
