"""Rules: which measured pairs they allow, what they look for, and that a method is one class and one registration."""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jointkv.core.blocks import ServedErrors
from jointkv.errors import InvalidPolicy
from jointkv.policy import FusionPolicy, base
from jointkv.policy.base import METHODS
from jointkv.policy.rule import NOT_ASKED, PairStatistics
from jointkv.policy.safe import Safe
from tests.fusion.strategies import Texture, make_case, members_of

numbers = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.25, 0.5, math.inf, math.nan])
cosines = st.floats(-1, 1, width=32) | st.sampled_from([0.5, math.nan])
pairs = st.lists(st.tuples(numbers, numbers, numbers, cosines, cosines), max_size=8)
thresholds = st.none() | st.sampled_from([0.0, 0.25, 0.5])


def permitted(policy, key, value, token, key_cosine, value_cosine):
    tests = [math.isfinite(key), math.isfinite(value), not math.isnan(token)]
    if policy.max_relative_error is not None:
        tests.append(max(key, value) <= policy.max_relative_error)
    if policy.max_token_error is not None:
        tests.append(token <= policy.max_token_error)
    if policy.key_threshold is not None:
        tests.append(key_cosine >= policy.key_threshold)
    if policy.value_threshold is not None:
        tests.append(value_cosine >= policy.value_threshold)
    return all(tests)


@given(pairs, st.sampled_from([0.25, 0.5, math.inf]), thresholds, thresholds, thresholds)
def test_a_pair_is_allowed_within_every_bound_and_threshold_whatever_holds_the_numbers(found, bound, token, key, value):
    policy = FusionPolicy(max_relative_error=bound, max_token_error=token, key_threshold=key, value_threshold=value)
    expected = [permitted(policy, *pair) for pair in found]
    measured = np.array(found, np.float32).reshape(-1, 5).T
    for library in (np.asarray, torch.tensor):
        columns: list[Any] = [library(numbers) for numbers in measured]
        *errors, key_cosine, value_cosine = columns
        assert policy.rule().allows(tuple(errors), (key_cosine, value_cosine)).tolist() == expected


def test_cosines_that_were_looked_at_before_are_not_asked():
    errors = ServedErrors(*torch.tensor([[0.1], [0.1], [0.1]]))
    rule = FusionPolicy(key_threshold=0.9).rule()
    assert rule.allows(errors, NOT_ASKED) and not rule.allows(errors, (torch.tensor([0.8]), None))


def test_a_rule_has_the_thresholds_of_its_group_and_bounds_may_move():
    policy = FusionPolicy(max_relative_error=(0.1, 0.3), layer_groups=2, across_layers="max")
    assert [policy.rule(group).max_relative_error for group in (0, 1)] == [0.1, 0.3]
    assert policy.rule(0).across_layers == "max"
    errors = ServedErrors(*torch.tensor([[0.2], [0.1], [0.1]]))
    moved = dataclasses.replace(policy.rule(0), max_relative_error=0.2)
    assert not policy.rule(0).allows(errors, NOT_ASKED) and moved.allows(errors, NOT_ASKED)


@pytest.mark.parametrize(
    ("changes", "limit", "of_keys"),
    [
        ({"max_relative_error": 0.2}, 0.08, 0.08),
        ({"max_relative_error": None, "key_threshold": 0.9, "value_threshold": 0.8}, 0.3, 0.2),
        ({"max_relative_error": None, "key_threshold": 0.9, "similarity": "key"}, 2.1, 0.2),
        ({"max_relative_error": 0.5, "key_threshold": 0.9, "value_threshold": 0.8}, 0.3, 0.2),
    ],
)
def test_signatures_may_be_as_far_apart_as_the_nearest_limit(changes, limit, of_keys):
    rule = FusionPolicy(**changes).rule()
    assert (rule.signature_limit, rule.key_limit) == (pytest.approx(limit), pytest.approx(of_keys))


def test_methods_have_names_of_their_own():
    for name in ("preset", "representative"):
        assert len({getattr(method, name) for method in METHODS}) == len(METHODS)


class Exact(Safe):
    """Blocks that are bitwise alike, and nothing else: the throw-away method of the test below."""

    preset = "exact"
    representative = "copy"
    defaults: ClassVar = {"max_relative_error": 0.0, "max_token_error": 0.0}

    @classmethod
    def check(cls, fields):
        if fields["max_relative_error"] != 0:
            raise InvalidPolicy("max_relative_error: copies have none")

    def merge(self, pairs: PairStatistics, alike: torch.Tensor) -> torch.Tensor:
        return super().merge(pairs, alike & (pairs.error == 0))


def test_a_new_method_is_a_class_and_a_registration(monkeypatch):
    monkeypatch.setitem(base.RULES, Exact.representative, Exact)
    monkeypatch.setitem(base.PRESETS, Exact.preset, {"representative": "copy", **Exact.defaults})
    policy = FusionPolicy.preset("exact")
    assert FusionPolicy.from_json(policy.to_json()) == policy and isinstance(policy.rule(), Exact)
    with pytest.raises(InvalidPolicy, match=r"^max_relative_error: copies have none"):
        FusionPolicy.preset("exact", max_relative_error=0.1)
    case = make_case(0, policy, [1, 1, 1], Texture(clusters=1, noise=0.01))
    for layer in (*case.pool.kv.keys, *case.pool.kv.values):
        layer[case.page(2, 0)] = layer[case.page(0, 0)]
    assert members_of(case.plans()[0]) == [(2, 0)]


def test_without_bounds_every_ratio_is_within_them():
    rule = FusionPolicy.preset("paper").rule()
    assert rule.ratio([np.array([0.1, math.inf, math.nan], np.float32)] * 3).tolist() == [0, 0, 0]


@given(pairs, st.sampled_from([0.0, 0.25, 0.5]), thresholds)
def test_a_ratio_of_at_most_1_is_what_the_bounds_allow(found, bound, token):
    rule = FusionPolicy(max_relative_error=bound, max_token_error=token).rule()
    errors = [np.array([pair[part] for pair in found], np.float32) for part in range(3)]
    allowed = rule.allows(tuple(errors), NOT_ASKED)
    ratio = rule.ratio(errors)
    assert not np.isnan(ratio).any()
    for within, permitted, token_error in zip(ratio <= 1, allowed, errors[2], strict=True):
        # Where no bound asks for tokens, what cannot be told of them is left to the blocks.
        assert within == permitted or (token is None and math.isnan(token_error))
