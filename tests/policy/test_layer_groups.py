"""Layers split into groups as the policy asks, or the policy is refused for the model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.errors import InvalidPolicy
from jointkv.policy import PER_LAYER, THRESHOLDS, FusionPolicy, LayerGroups


@settings(max_examples=200)
@given(
    layers=st.integers(1, 12),
    groups=st.integers(2, 12) | st.just(PER_LAYER),
    first=st.integers(0, 5),
    last=st.integers(0, 5),
    enabled=st.booleans(),
)
def test_groups_leave_out_exactly_the_skipped_layers_or_are_refused(layers, groups, first, last, enabled):
    policy = FusionPolicy(layer_groups=groups, skip_first_layers=first, skip_last_layers=last, enabled=enabled)
    count = layers if groups == PER_LAYER else groups
    if layers % count:
        refused = "layer_groups"
    elif first % (layers // count):
        refused = "skip_first_layers"
    elif last % (layers // count):
        refused = "skip_last_layers"
    else:
        split = LayerGroups.of(policy, layers)
        assert (split.count, split.layers) == (count, layers // count)
        by_layer = [split.fused[layer // split.layers] for layer in range(layers)]
        assert by_layer == [enabled and first <= layer < layers - last for layer in range(layers)]
        return
    with pytest.raises(InvalidPolicy, match=f"^{refused}: "):
        LayerGroups.of(policy, layers)


@pytest.mark.parametrize("field", THRESHOLDS)
def test_a_list_per_layer_must_have_one_entry_per_layer(field):
    policy = FusionPolicy(**{field: [0.5, 0.5, 0.5]}, layer_groups=PER_LAYER)
    assert LayerGroups.of(policy, 3).count == 3
    with pytest.raises(InvalidPolicy, match=f"^{field}: 3 thresholds for 4"):
        LayerGroups.of(policy, 4)
