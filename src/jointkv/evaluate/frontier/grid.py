"""What is tried: series of policies that differ in one number, from the strictest on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from jointkv.errors import BadInput
from jointkv.evaluate.traffic import get_traffic
from jointkv.policy import FusionPolicy, Scope

Candidates = Literal["tokens", "signature"]
Serves = Literal["page", "direction"]
Decides = Literal["error", "keys"]
Groups = int | Literal["per_layer"]

TOKEN_BOUND = 1.5
"""Bound of a single token over that of its block, as in `safe`."""

CANDIDATES_COMPARED = 64
"""Enough for the number of candidates not to decide."""


@dataclass(frozen=True)
class FrontierSettings:
    """Sizes, and the values of every choice.

    Attributes:
        traffics: kinds of requests.
        requests: of each.
        tokens: true tokens scored after each prompt.
        block_sizes: tokens per block.
        layer_groups: as in `FusionPolicy`.
        bounds: relative errors of a block's K and V, ascending.
        cosines: thresholds of keys where keys decide alone, descending.
        most_kl: a series ends with the first policy beyond it.
    """

    traffics: tuple[str, ...] = ("unrelated", "retrieval", "near_prefix")
    requests: int = 12
    tokens: int = 24
    block_sizes: tuple[int, ...] = (4, 16)
    layer_groups: tuple[Groups, ...] = (1, "per_layer")
    bounds: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    cosines: tuple[float, ...] = (0.98, 0.95, 0.9, 0.85, 0.8)
    most_kl: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Raises `BadInput` where a setting makes no sense."""
        for name in self.traffics:
            get_traffic(name)
        for name in ("traffics", "block_sizes", "layer_groups", "bounds", "cosines"):
            if not getattr(self, name):
                raise BadInput(f"{name}: give at least one")
        if min(self.bounds) <= 0:
            raise BadInput(f"bounds: {min(self.bounds):g} leaves nothing to trade; give positive ones")
        if self.requests < 2:
            raise BadInput(f"requests: {self.requests} have nobody to share with")


@dataclass(frozen=True)
class Series:
    """Policies that differ only in how far apart blocks may be.

    Attributes:
        candidates: how resident blocks are found.
        serves: a page as it stands, or the mean direction of a group with each member's own norms.
        decides: the error of K and V, or the cosine of keys alone, without a bound.
        layer_groups: groups of layers that decide apart.
    """

    candidates: Candidates
    serves: Serves
    decides: Decides
    layer_groups: Groups
    levels: tuple[float, ...] = field(repr=False, default=())

    def policy(self, level: float, scope: Scope) -> FusionPolicy:
        """The policy of one level of the series."""
        directions = self.serves == "direction"
        # With its own norm a member is off by the sine of its angle to the direction at the most.
        near = level if self.decides == "keys" else math.sqrt(max(0.0, 1.0 - level * level))
        bounded = self.decides == "error"
        return FusionPolicy(
            similarity="key" if directions else "key_value",
            key_threshold=near if directions else None,
            max_relative_error=level if bounded else None,
            max_token_error=TOKEN_BOUND * level if bounded else None,
            representative="direction" if directions else "resident",
            scope=scope,
            layer_groups=self.layer_groups,
            candidates=self.candidates,
            max_candidates=CANDIDATES_COMPARED,
        )


def all_series(settings: FrontierSettings) -> Iterator[Series]:
    """Every combination of what can be chosen."""
    kinds: tuple[tuple[Candidates, Serves, Decides], ...] = (
        ("tokens", "page", "error"),
        ("signature", "page", "error"),
        ("signature", "direction", "error"),
        ("signature", "direction", "keys"),
    )
    for groups, (candidates, serves, decides) in product(settings.layer_groups, kinds):
        levels = settings.bounds if decides == "error" else settings.cosines
        yield Series(candidates, serves, decides, groups, levels)
