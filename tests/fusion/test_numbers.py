"""Blocks that hold NaN or infinity, or numbers whose squares leave float32, never break a promise."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.shadow import naive_error
from tests.fusion.strategies import DIRECTION, KEYS_ONLY, RESIDENT, Texture, assert_same_plan, cases, make_case

BOUND_ROUNDING = 1e-6


@settings(max_examples=150)
@given(cases(), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.data())
def test_blocks_that_are_no_numbers_count_as_absent(case, poison, data):
    entries = case.entries()
    if not entries:
        return
    bad = data.draw(st.lists(st.sampled_from(entries), min_size=1, max_size=3, unique=True))
    kv, policy = case.pool.kv, case.policy
    values_are_compared = policy.value_threshold is not None or (
        policy.representative == "resident" and policy.max_relative_error is not None
    )
    layers = [*kv.keys, *kv.values] if values_are_compared else kv.keys
    for entry in bad:
        layer = layers[data.draw(st.integers(0, len(layers) - 1))]
        layer[case.page(*entry)].view(-1)[0] = poison
    poisoned = torch.tensor([case.page(*entry) for entry in bad])
    plans = case.plans()
    for plan in plans:
        assert not torch.isin(torch.cat((plan.page, plan.old_page)), poisoned).any()
    case.table.pages[torch.isin(case.table.pages, poisoned)] = -1
    for plan, without in zip(plans, case.plans(), strict=True):
        assert len(plan) == len(without)
        if len(plan):
            assert_same_plan(plan, without)


@pytest.mark.parametrize("policy", [KEYS_ONLY, DIRECTION], ids=["resident", "direction"])
def test_a_value_that_is_no_number_spoils_no_group_that_keys_decide(policy):
    case = make_case(0, policy, [1, 1, 1], Texture(clusters=1, noise=0.01))
    before = len(case.table.held().unique())
    case.pool.kv.values[0][case.page(0, 0)] = torch.nan
    case.apply()
    assert len(case.table.held().unique()) == before - 1


@pytest.mark.parametrize("value", [1e-25, 1e25], ids=["vanish", "overflow"])
@pytest.mark.parametrize("policy", [RESIDENT, DIRECTION], ids=["resident", "direction"])
def test_the_bound_holds_where_squares_leave_float32(policy, value):
    policy = dataclasses.replace(policy, max_relative_error=0.3)
    case = make_case(0, policy, [1, 1], Texture(clusters=1, noise=0.0))
    for layer in case.pool.kv.values:
        layer[case.page(0, 0)], layer[case.page(1, 0)] = value, -value
    before = case.read()
    case.apply()
    for entry, block in case.read().items():
        assert naive_error(before[entry][1] / value, block[1] / value, "rms") <= 0.3 + BOUND_ROUNDING
