"""Policies: what the presets are, what is refused and under which field's name, JSON brings them back."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.errors import InvalidPolicy, JointKVError
from jointkv.policy import PER_LAYER, FusionPolicy, LayerGroups

DIRECTION = {"representative": "direction", "similarity": "key", "key_threshold": 0.8}

REFUSED = [
    ("similarity", {"similarity": "values"}),
    ("similarity", {"similarity": ["key"]}),
    ("representative", {"representative": "mean"}),
    ("scope", {"scope": "request"}),
    ("across_layers", {"across_layers": "mean"}),
    ("candidates", {"candidates": "all"}),
    ("candidates", {"candidates": None}),
    ("key_threshold", {"key_threshold": 1.01}),
    ("key_threshold", {"key_threshold": -1.01}),
    ("key_threshold", {"key_threshold": math.nan}),
    ("key_threshold", {"key_threshold": "0.8"}),
    ("key_threshold", {"key_threshold": True}),
    ("key_threshold", {"key_threshold": []}),
    ("key_threshold", {"key_threshold": [0.5, 2.0], "layer_groups": 2}),
    ("key_threshold", {"key_threshold": [0.5, [0.5]], "layer_groups": 2}),
    ("key_threshold", {"key_threshold": [0.5, 0.5]}),
    ("key_threshold", {"key_threshold": [0.5, 0.5], "layer_groups": 3}),
    ("value_threshold", {"value_threshold": 1.5}),
    ("value_threshold", {"value_threshold": 0.5, "similarity": "key"}),
    ("max_relative_error", {"max_relative_error": -0.1}),
    ("max_relative_error", {"max_relative_error": math.nan}),
    ("max_relative_error", {"max_relative_error": (0.1, -0.1), "layer_groups": 2}),
    ("max_relative_error", {"max_relative_error": (0.1, 0.1, 0.1), "layer_groups": 2}),
    ("max_token_error", {"max_token_error": -0.1}),
    ("max_token_error", {"max_token_error": "0.3"}),
    ("max_token_error", {"max_token_error": (0.1, 0.1, 0.1), "layer_groups": 2}),
    ("chunk_tokens", {"chunk_tokens": 0}),
    ("chunk_tokens", {"chunk_tokens": 512.0}),
    ("chunk_tokens", {"chunk_tokens": True}),
    ("skip_first_layers", {"skip_first_layers": -1}),
    ("skip_last_layers", {"skip_last_layers": "2"}),
    ("skip_first_layers", {"skip_first_layers": 2}),
    ("skip_last_layers", {"skip_last_layers": 2}),
    ("max_candidates", {"max_candidates": 0}),
    ("layer_groups", {"layer_groups": 0}),
    ("layer_groups", {"layer_groups": 1.0}),
    ("layer_groups", {"layer_groups": True}),
    ("layer_groups", {"layer_groups": "all"}),
    ("key_threshold", {"max_relative_error": None}),
    ("key_threshold", {"representative": "direction"}),
    ("value_threshold", {"representative": "direction", "key_threshold": 0.8}),
    ("scope", {**DIRECTION, "scope": "both"}),
    ("enabled", {"enabled": "no"}),
    # Values would be compared with nothing, although `key_value` promises that both must agree.
    (
        "value_threshold",
        {"similarity": "key_value", "key_threshold": 0.9, "max_relative_error": None, "max_token_error": None},
    ),
]


@pytest.mark.parametrize(("field", "changes"), REFUSED, ids=[f"{f}-{c}" for f, c in REFUSED])
def test_a_refusal_begins_with_the_name_of_its_field(field, changes):
    with pytest.raises(InvalidPolicy, match=f"^{field}: ") as refused:
        FusionPolicy(**changes)
    assert isinstance(refused.value, JointKVError) and isinstance(refused.value, ValueError)


def test_safe_is_the_default_and_compares_both_sides_under_a_bound():
    safe = FusionPolicy.preset("safe")
    assert safe == FusionPolicy()
    assert safe.enabled and safe.representative == "resident" and safe.similarity == "key_value"
    assert (safe.max_relative_error, safe.max_token_error) == (0.2, 0.3)


def test_paper_is_algorithm_1_by_keys_alone_without_the_outer_layers():
    paper = FusionPolicy.preset("paper")
    assert (paper.similarity, paper.representative) == ("key", "direction")
    assert paper.max_relative_error is paper.max_token_error is None and paper.key_threshold == 0.75
    assert (paper.skip_first_layers, paper.skip_last_layers) == (2, 2)
    assert LayerGroups.of(paper, 6).fused == (False, False, True, True, False, False)


def test_off_fuses_no_group():
    assert not FusionPolicy.preset("off").enabled
    assert LayerGroups.of(FusionPolicy.preset("off"), 4).fused == (False,)
    assert LayerGroups.of(FusionPolicy.preset("off", layer_groups=PER_LAYER), 4).fused == (False,) * 4


def test_preset_replaces_fields_and_refuses_unknown_ones():
    assert FusionPolicy.preset("paper", key_threshold=0.9).key_threshold == 0.9
    with pytest.raises(InvalidPolicy, match=r"^preset: 'fast'"):
        FusionPolicy.preset("fast")
    with pytest.raises(InvalidPolicy, match=r"^treshold: no such field"):
        FusionPolicy.preset("safe", treshold=0.9)


def test_a_policy_is_frozen_and_hashable_also_with_a_list_of_thresholds():
    policy = FusionPolicy(max_relative_error=[0.1, 0.2], layer_groups=2)
    assert policy.max_relative_error == (0.1, 0.2)
    assert hash(policy) == hash(FusionPolicy(max_relative_error=(0.1, 0.2), layer_groups=2))
    with pytest.raises(AttributeError):
        policy.enabled = False


def test_threshold_picks_the_group_and_repeats_a_single_number():
    policy = FusionPolicy(key_threshold=0.9, max_relative_error=(0.1, 0.2), layer_groups=2)
    assert [policy.threshold("max_relative_error", group) for group in (0, 1)] == [0.1, 0.2]
    assert [policy.threshold("key_threshold", group) for group in (0, 1)] == [0.9, 0.9]
    assert policy.threshold("value_threshold", 1) is None


cosines = st.floats(-1, 1, allow_nan=False)


@st.composite
def policies(draw: st.DrawFn) -> FusionPolicy:
    groups = draw(st.sampled_from([1, 2, 4, PER_LAYER]))
    length = 3 if groups == PER_LAYER else groups

    def threshold(numbers: st.SearchStrategy[float]) -> object:
        return draw(numbers | st.lists(numbers, min_size=length, max_size=length))

    fields: dict[str, object] = {
        "layer_groups": groups,
        "enabled": draw(st.booleans()),
        "across_layers": draw(st.sampled_from(["rms", "max"])),
        "candidates": draw(st.sampled_from(["signature", "tokens", "both"])),
        "chunk_tokens": draw(st.integers(1, 4096)),
        "max_candidates": draw(st.integers(1, 9)),
        "key_threshold": threshold(cosines),
        "max_relative_error": threshold(st.floats(0, 4) | st.just(math.inf)),
        "max_token_error": threshold(st.floats(0, 4)),
        "representative": draw(st.sampled_from(["resident", "direction"])),
        "scope": draw(st.sampled_from(["batch", "chunk"])),
    }
    if draw(st.booleans()):
        fields["similarity"] = "key"
    else:
        fields["value_threshold"] = threshold(cosines)
    if groups != 1:
        fields |= {"skip_first_layers": draw(st.integers(0, 4)), "skip_last_layers": draw(st.integers(0, 4))}
    return FusionPolicy(**fields)


@settings(max_examples=60)
@given(policies())
def test_json_brings_a_policy_back(policy):
    text = policy.to_json()
    assert "\n" not in text
    assert FusionPolicy.from_json(text) == policy


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("policy", "{"),
        ("policy", ""),
        ("policy", "[1, 2]"),
        ("policy", "null"),
        ("tolerance", '{"tolerance": 0.1}'),
        ("name", '{"name": "safe"}'),
        ("cls", '{"cls": 1}'),
        ("scope", '{"scope": "all"}'),
        ("max_relative_error", '{"max_relative_error": "0.1"}'),
        ("max_relative_error", '{"max_relative_error": [0.1, 0.2]}'),
    ],
)
def test_bad_json_is_refused_under_a_name(field, text):
    with pytest.raises(InvalidPolicy, match=f"^{field}: "):
        FusionPolicy.from_json(text)


def test_json_fields_left_out_are_the_safe_ones():
    assert FusionPolicy.from_json("{}") == FusionPolicy.preset("safe")
    assert FusionPolicy.from_json(json.dumps({"scope": "chunk"})) == FusionPolicy(scope="chunk")
