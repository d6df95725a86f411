"""The promise: whatever blocks and policy are, every member reads what its plan says, within the bound."""

import dataclasses
from contextlib import suppress
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.errors import JointKVError, LayoutError
from jointkv.fusion import pairs
from jointkv.fusion.tree import plan_matrix
from jointkv.policy import FusionPolicy
from tests.core.shadow import naive_error, naive_token_error
from tests.fusion.strategies import (
    DIRECTION,
    KEYS_ONLY,
    NOISES,
    RESIDENT,
    UNBOUNDED,
    Texture,
    assert_same_plan,
    cases,
    make_case,
    members_of,
    policies,
    textures,
)

BOUND_ROUNDING = 1e-6
REPORT_ROUNDING = 1e-5
COSINE_ROUNDING = 1e-4


def only_exact(scope):
    return FusionPolicy(max_relative_error=0.0, scope=scope)


def cosine(first, second):
    """Mean over the layers of the cosines of `[layers, r]`."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(1) / np.where(norms == 0, 1, norms)).mean())


def check_promise(case):
    before, pages_before = case.read(), len(case.table.held().unique())
    plans = case.apply()
    after = case.read()
    policy, tokens = case.policy, case.pool.block_size
    members = [(entry, i, plan) for plan in plans for i, entry in enumerate(members_of(plan))]
    for entry, i, plan in members:
        sides = list(zip(before[entry], after[entry], strict=True))
        key, value = (naive_error(block, read, policy.across_layers) for block, read in sides)
        token = max(naive_token_error(block, read, tokens, policy.across_layers) for block, read in sides)
        for error, reported, bound in (
            (key, plan.key_error, policy.max_relative_error),
            (value, plan.value_error, policy.max_relative_error),
            (token, plan.token_error, policy.max_token_error),
        ):
            assert bound is None or error <= bound + BOUND_ROUNDING
            assert error == pytest.approx(float(reported[i]), rel=REPORT_ROUNDING, abs=REPORT_ROUNDING)
    moved = {entry for entry, _, _ in members}
    assert len(moved) == len(members)
    for entry in set(before) - moved:
        assert all(np.array_equal(b, a) for b, a in zip(before[entry], after[entry], strict=True))
    assert len(case.table.held().unique()) == pages_before - sum(plan.pages_released for plan in plans)
    if policy.representative == "direction":
        assert all(plan.page.unique(return_counts=True)[1].gt(1).all() for plan in plans)


@settings(max_examples=400)
@given(cases())
def test_the_promise(case):
    check_promise(case)


@settings(max_examples=250)
@given(cases(), st.sampled_from(["key_error", "value_error", "token_error"]), st.sampled_from([0.999, 1.001]))
def test_a_bound_between_errors_parts_the_members(case, which, factor):
    case.policy = dataclasses.replace(case.policy, **{**UNBOUNDED, "key_threshold": case.policy.key_threshold or 0.3})
    errors = torch.cat([getattr(plan, which) for plan in case.plans()])
    errors = errors[errors > COSINE_ROUNDING]
    if not len(errors):
        return
    name = "max_token_error" if which == "token_error" else "max_relative_error"
    bound = float(errors.sort().values[len(errors) // 2]) * factor
    case.policy = dataclasses.replace(case.policy, **{name: bound})
    check_promise(case)


@settings(max_examples=150)
@given(cases(policies("resident")))
def test_residents_serve_their_page_as_it_stands_and_never_move(case):
    before = case.read()
    owner = {case.page(*entry): entry for entry in case.entries()}
    plans = case.apply()
    after = case.read()
    served_by = torch.cat([plan.page for plan in plans])
    assert not torch.isin(served_by, torch.cat([plan.old_page for plan in plans])).any(), "a chain"
    for plan in plans:
        assert plan.k_scale is None and plan.v_scale is None and plan.direction_page is None
        for entry, page in zip(members_of(plan), plan.page.tolist(), strict=True):
            leader = owner[page]
            assert case.place(*leader) == case.place(*entry) and leader != entry
            names = ("key_threshold", "value_threshold")
            for side, threshold in enumerate(getattr(case.policy, name) for name in names):
                assert np.array_equal(after[entry][side], before[leader][side])
                if threshold is not None:
                    found = cosine(before[entry][side], before[leader][side])
                    assert found >= threshold - COSINE_ROUNDING


@settings(max_examples=150)
@given(cases(policies("direction").map(lambda p: dataclasses.replace(p, **UNBOUNDED))))
def test_directions_are_the_normalised_mean_of_unit_vectors_times_own_norms(case):
    before = case.read()
    owner = {case.page(*entry): entry for entry in case.entries()}
    plans = case.apply()
    after = case.read()
    for plan in plans:
        for page in plan.page.unique().tolist():
            group = [e for e, p in zip(members_of(plan), plan.page.tolist(), strict=True) if p == page]
            assert len(group) > 1 and owner[page] in group
            assert len({case.place(*entry) for entry in group}) == 1
            for side, layers in enumerate((case.pool.kv.keys, case.pool.kv.values)):
                for layer, stored in enumerate(layers):
                    blocks = [before[entry][side][layer] for entry in group]
                    total = sum(block / max(np.linalg.norm(block), 1e-30) for block in blocks)
                    mean = total / max(np.linalg.norm(total), 1e-30)
                    eps = torch.finfo(stored.dtype).eps
                    assert np.abs(stored[page].double().numpy().ravel() - mean).max() <= 2 * eps
                    for entry, block in zip(group, blocks, strict=True):
                        read = after[entry][side][layer]
                        assert np.linalg.norm(read) == pytest.approx(np.linalg.norm(block), rel=1e-5 + eps)


@settings(max_examples=50)
@given(cases())
def test_plans_depend_on_nothing_but_the_blocks(case):
    for one, other in zip(case.plans(), case.plans(), strict=True):
        assert_same_plan(one, other)


@settings(max_examples=60)
@given(cases(policies(scope="batch")))
def test_a_block_alone_at_its_position_is_left_alone(case):
    (plan,) = case.plans()
    others = [sum(length > slot for length in case.lengths) for _, slot in members_of(plan)]
    assert all(count > 1 for count in others)


@settings(max_examples=60)
@given(cases(policies("resident").map(lambda p: FusionPolicy(max_relative_error=0.0, scope=p.scope))), textures())
def test_bound_zero_merges_exact_copies_and_nothing_else(case, texture):
    texture = dataclasses.replace(texture, noise=0.0, spread=0.0)
    kv = case.pool.kv
    shape = (*kv.keys[0].shape[1:], kv.values[0].shape[-1])
    case = make_case(7, case.policy, case.lengths, texture, layers=kv.num_layers, shape=shape, dtype=kv.keys[0].dtype)
    before = case.read()
    case.apply()
    for entry, block in case.read().items():
        assert all(np.array_equal(b, a) for b, a in zip(before[entry], block, strict=True))
    contents = {(case.place(*e), b[0].tobytes(), b[1].tobytes()) for e, b in before.items()}
    assert len(case.table.held().unique()) == len(contents)


def test_a_near_copy_that_the_bound_forbids_does_not_cost_the_exact_ones():
    case = make_case(0, FusionPolicy(max_relative_error=0.0), [1, 1, 1, 1], Texture(clusters=1, noise=1e-3))
    original, copy = case.page(2, 0), case.page(3, 0)
    for layer in (*case.pool.kv.keys, *case.pool.kv.values):
        layer[copy] = layer[original]
    (plan,) = case.apply()
    assert members_of(plan) == [(3, 0)]


def test_copies_that_differ_in_one_token_keep_merging_among_themselves():
    """Two texts that differ in one word: the blocks are alike as a whole, but the token bound keeps them apart."""
    policy = FusionPolicy(max_relative_error=0.3, max_token_error=0.3)
    case = make_case(0, policy, [1, 1, 1, 1], Texture(clusters=1, noise=0.0), shape=(16, 1, 4, 4))
    for layer in (*case.pool.kv.keys, *case.pool.kv.values):
        for row in (2, 3):
            layer[case.page(row, 0), 5] *= 0.4
    (plan,) = case.apply()
    assert members_of(plan) == [(1, 0), (3, 0)]


def test_keys_alone_decide_when_values_are_not_asked():
    for kind in (KEYS_ONLY, DIRECTION):
        case = make_case(3, kind, [2] * 5, Texture(clusters=2, noise=0.05))
        (plan,) = case.plans()
        assert len(plan)
        for layer in case.pool.kv.values:
            layer.copy_(torch.randn(layer.shape, generator=case.generator))
        (other,) = case.plans()
        assert members_of(plan) == members_of(other) and torch.equal(plan.page, other.page)


@pytest.mark.parametrize("policy", [RESIDENT, DIRECTION], ids=["resident", "direction"])
def test_cutting_the_work_into_parts_changes_no_group(policy):
    case = make_case(5, policy, [7, 4, 7, 6, 5], Texture(clusters=2, noise=NOISES[2]))
    (whole,) = case.plans()
    sizes = [name for name in vars(pairs) if name.endswith("_BYTES")]
    assert sizes
    with patch.multiple(pairs, **dict.fromkeys(sizes, 1)):
        (cut,) = case.plans()
    assert len(whole) and members_of(whole) == members_of(cut) and torch.equal(whole.page, cut.page)


def test_blocks_that_already_read_scaled_directions_keep_the_promise_or_are_refused():
    policy = dataclasses.replace(DIRECTION, max_relative_error=0.1)
    case = make_case(1, policy, [1, 1, 1], Texture(clusters=1, noise=0.01, spread=1.0))
    rows, slots = torch.arange(3)[None], torch.zeros(1, 3, dtype=torch.long)
    before = case.read()
    pages = case.table.pages[:, 0][None]
    first = plan_matrix(case.pool.kv, pages[:, 1:], rows[:, 1:], slots[:, 1:], policy)
    assert len(first) == 2 and case.table.apply(first) == 1
    pages = case.table.pages[:, 0][None]
    with suppress(JointKVError):
        case.table.apply(plan_matrix(case.pool.kv, pages, rows, slots, policy))
    for entry, block in case.read().items():
        # Twice the bound: a direction of directions may be off by both.
        assert naive_error(before[entry][0], block[0], "rms") <= 2 * 0.1


def test_a_policy_that_is_off_and_requests_that_are_empty_give_empty_plans():
    off = FusionPolicy.preset("off")
    assert not len(make_case(0, off, [2, 2], Texture(clusters=1)).plans()[0])
    for scope in ("batch", "chunk"):
        empty = make_case(0, FusionPolicy(scope=scope), [0, 0], Texture())
        assert not any(map(len, empty.plans()))


def test_shapes_that_do_not_fit_are_refused():
    case = make_case(0, RESIDENT, [2, 2], Texture())
    pages = torch.zeros(2, 2, dtype=torch.long)
    for wrong in (pages[:1], pages[0]):
        with pytest.raises(LayoutError, match="one shape"):
            plan_matrix(case.pool.kv, pages, wrong, pages, RESIDENT)
