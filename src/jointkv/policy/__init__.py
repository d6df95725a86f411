"""What may be fused, how alike it must be, and what then stands in its place."""

from jointkv.policy.base import PER_LAYER, THRESHOLDS, FusionPolicy, LayerAggregate, LayerGroups, Scope

__all__ = ["PER_LAYER", "THRESHOLDS", "FusionPolicy", "LayerAggregate", "LayerGroups", "Scope"]
