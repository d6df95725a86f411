"""How the layers of a model split into groups that share one decision and one block table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jointkv.errors import InvalidPolicy
from jointkv.policy.base import PER_LAYER, FusionPolicy


@dataclass(frozen=True)
class LayerGroups:
    """How the layers of a model split into groups of consecutive layers, and which groups take part.

    Attributes:
        layers: layers per group; layer `i` is layer `i % layers` of group `i // layers`.
        count: number of groups.
        fused: one flag per group.
    """

    layers: int
    count: int
    fused: tuple[bool, ...]

    @classmethod
    def of(cls, policy: FusionPolicy, num_layers: int) -> LayerGroups:
        """Split `num_layers` layers as `policy` asks.

        Raises:
            InvalidPolicy: the groups do not divide the layers, skipped layers cut a group, or thresholds are
                fewer or more than groups.
        """
        count = num_layers if policy.layer_groups == PER_LAYER else int(policy.layer_groups)
        if num_layers % count:
            raise InvalidPolicy(f"layer_groups: {count} does not divide the model's {num_layers} layers")
        layers = num_layers // count
        for name in ("skip_first_layers", "skip_last_layers"):
            if getattr(policy, name) % layers:
                largest = math.gcd(num_layers, policy.skip_first_layers, policy.skip_last_layers)
                raise InvalidPolicy(
                    f"{name}: {getattr(policy, name)} cuts a group of {layers} layers; set layer_groups to "
                    f"{num_layers // largest}, for groups of {largest}"
                )
        policy.check_thresholds(count)
        first, last = policy.skip_first_layers // layers, policy.skip_last_layers // layers
        fused = tuple(policy.enabled and first <= group < count - last for group in range(count))
        return cls(layers, count, fused)
