"""What may be fused, how alike it must be, and what then stands in its place."""

from jointkv.core.blocks import LayerAggregate
from jointkv.policy.base import PER_LAYER, THRESHOLDS, FusionPolicy, Scope
from jointkv.policy.layer_groups import LayerGroups

__all__ = ["PER_LAYER", "THRESHOLDS", "FusionPolicy", "LayerAggregate", "LayerGroups", "Scope"]
