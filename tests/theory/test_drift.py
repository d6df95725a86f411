"""Bounds on the drift of attention hold for all inputs, vanish with the error, and are attained where claimed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jointkv.errors import LayoutError
from jointkv.theory.drift import (
    AttentionDrift,
    Bound,
    attention_drift,
    kl_bound,
    logit_shift_bound,
    total_variation_bound,
)

NAMES = ("logit_shift", "total_variation", "kl", "output")


def drawn(
    seed: int, tokens: int, size: int, error: float, norm: float, rows: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, keys, keys read, values, values read; errors are relative to each token's norm and vary between tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, keys, values = norm * normal(rows, size), normal(rows, tokens, size) + 1, normal(rows, tokens, size)
    read = []
    for states in (keys, values):
        noise = normal(rows, tokens, size)
        share = error * torch.rand(rows, tokens, 1, generator=generator, dtype=torch.float64) ** 3
        read.append(states + share * states.norm(dim=-1, keepdim=True) * noise / noise.norm(dim=-1, keepdim=True))
    return query, keys, read[0], values, read[1]


def all_hold(drift: AttentionDrift) -> bool:
    return all(getattr(drift, name).holds() for name in NAMES)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 100_000),
    tokens=st.integers(1, 40),
    size=st.integers(1, 16),
    error=st.floats(0, 3),
    norm=st.sampled_from([1e-6, 0.1, 1.0, 30.0, 1e4]),
    masked=st.booleans(),
)
def test_bounds_are_never_violated(seed: int, tokens: int, size: int, error: float, norm: float, masked: bool) -> None:
    mask = None
    if masked:
        mask = torch.rand(3, tokens, generator=torch.Generator().manual_seed(seed)) < 0.5
        mask[:, 0] = True
    drift = attention_drift(*drawn(seed, tokens, size, error, norm), scale=size**-0.5, mask=mask)
    assert all_hold(drift)
    for name in NAMES:
        bound = getattr(drift, name)
        assert bound.bound.isfinite().all() and bound.actual.isfinite().all()
        assert (bound.tightness <= 1 + 1e-6).all() or (bound.actual <= 1e-7).any()


@settings(max_examples=100)
@given(seed=st.integers(0, 100_000), tokens=st.integers(1, 30), width=st.floats(0, 60))
def test_row_bounds_hold_for_any_shift(seed: int, tokens: int, width: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(tokens, generator=generator, dtype=torch.float64)
    shift = width * torch.rand(tokens, generator=generator, dtype=torch.float64) ** 4
    moved = shift * (1 - 2 * (torch.rand(tokens, generator=generator) < 0.5).double())
    log_p, log_read = logits.log_softmax(0), (logits + moved).log_softmax(0)
    variation = (log_p.exp() - log_read.exp()).abs().sum() / 2
    forward, backward = ((p.exp() * (p - q)).sum() for p, q in ((log_p, log_read), (log_read, log_p)))
    for weights in (None, log_p):
        assert variation <= total_variation_bound(shift, weights) + 1e-12
        assert forward <= kl_bound(shift, weights) + 1e-10
    assert backward <= kl_bound(shift) + 1e-10


@pytest.mark.parametrize("shift", [0.02, 0.2, 1.0, 4.0])
def test_two_tokens_attain_the_bounds(shift: float) -> None:
    shifts = torch.tensor([shift, shift], dtype=torch.float64)
    moved = torch.stack((shifts[0], -shifts[1]))
    shares = torch.linspace(1e-4, 1 - 1e-4, 20_001, dtype=torch.float64)
    log_p = torch.stack((shares, 1 - shares), 1).log()
    log_read = (log_p + moved).log_softmax(1)
    variation = ((log_p.exp() - log_read.exp()).abs().sum(1) / 2).max()
    divergence = (log_p.exp() * (log_p - log_read)).sum(1).max()
    assert float(variation) == pytest.approx(math.tanh(shift / 2), rel=1e-4)
    assert float(total_variation_bound(shifts)) == pytest.approx(math.tanh(shift / 2))
    assert float(divergence) == pytest.approx(float(kl_bound(shifts)), rel=1e-3)


def test_kl_bound_is_below_hoeffding_and_continuous() -> None:
    widths = torch.linspace(0, 40, 4001, dtype=torch.float64)
    bound = kl_bound(widths[:, None] / 2)
    assert (bound <= widths.square() / 8 + 1e-12).all() and (bound <= widths).all()
    assert (bound.diff() > 0).all()
    assert float(kl_bound(torch.tensor([1e5]))) == pytest.approx(2e5 - math.log(2e5) - 1)
    assert float(kl_bound(torch.zeros(3))) == 0 == float(total_variation_bound(torch.zeros(3)))


def test_a_shift_nobody_attends_to_costs_little() -> None:
    shift = torch.tensor([0.0, 3.0], dtype=torch.float64)
    log_p = torch.tensor([-1e-9, -20.0], dtype=torch.float64)
    assert float(kl_bound(shift, log_p)) < 1e-6 < 1 < float(kl_bound(shift))
    # A token whose probability underflows counts all the same: the shift may lift it.
    assert float(kl_bound(torch.tensor([0.0, 2000.0]), torch.tensor([0.0, -1000.0]))) > 900


def test_no_error_no_drift() -> None:
    query, keys, _, values, _ = drawn(0, 9, 4, 0.5, 1.0)
    drift = attention_drift(query, keys, keys, values, values, 0.5)
    for name in NAMES:
        bound = getattr(drift, name)
        assert (bound.bound == 0).all() and (bound.actual == 0).all() and (bound.tightness == 1).all()


def test_bounds_grow_with_the_error() -> None:
    query, keys, _, values, _ = drawn(1, 20, 8, 0.0, 1.0)
    noise = drawn(2, 20, 8, 0.0, 1.0)[1]
    before = None
    for error in (0.01, 0.05, 0.2, 1.0):
        drift = attention_drift(query, keys, keys + error * noise, values, values + error * noise, 0.3)
        bounds = torch.stack([getattr(drift, name).bound for name in NAMES])
        assert before is None or (bounds >= before).all()
        before = bounds


@pytest.mark.parametrize("serving", ["resident", "direction"])
def test_relative_errors_of_blocks_bound_the_shift(serving: str) -> None:
    query, keys, *_ = drawn(3, 16, 8, 0.0, 2.0)
    other = 1.2 * keys + 0.1 * drawn(4, 16, 8, 0.0, 1.0)[1]
    block, partner = (states.flatten(1) for states in (keys, other))
    if serving == "resident":
        read = partner
    else:
        norm = block.norm(dim=1, keepdim=True)
        mean = block / norm + partner / partner.norm(dim=1, keepdim=True)
        read = norm * mean / mean.norm(dim=1, keepdim=True)
    error = (block - read).norm(dim=1, keepdim=True) / block.norm(dim=1, keepdim=True)
    shift = ((keys - read.view_as(keys)) @ query[..., None]).squeeze(-1).abs() * 0.3
    bound = logit_shift_bound(query, block.norm(dim=1, keepdim=True), error, 0.3)
    assert (shift <= bound).all() and (shift.amax(1) > 0.01 * bound[:, 0]).all()


def test_masked_tokens_play_no_part() -> None:
    query, keys, keys_read, values, values_read = drawn(5, 10, 4, 0.3, 1.0)
    mask = torch.arange(10) < 6
    wild_keys, wild_values = keys_read.clone(), values_read.clone()
    wild_keys[:, 6:], wild_values[:, 6:] = 1e6, -1e6
    masked = attention_drift(query, keys, wild_keys, values, wild_values, 0.5, mask.expand(3, 10))
    cut = attention_drift(query, *(states[:, :6] for states in (keys, keys_read, values, values_read)), scale=0.5)
    for name in NAMES:
        assert torch.allclose(getattr(masked, name).actual, getattr(cut, name).actual)
        assert torch.allclose(getattr(masked, name).bound, getattr(cut, name).bound)


def test_a_violated_bound_is_seen() -> None:
    violated = Bound(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.1]))
    assert not violated.holds() and violated.tightness.tolist() == [0.5, math.inf]


def test_wrong_shapes_are_refused() -> None:
    query, keys, keys_read, values, values_read = drawn(0, 5, 4, 0.1, 1.0)
    with pytest.raises(LayoutError, match="in their place"):
        attention_drift(query, keys, keys_read[:, :4], values, values_read, 1.0)
    with pytest.raises(LayoutError, match="do not fit"):
        attention_drift(query[:, :3], keys, keys_read, values, values_read, 1.0)
    with pytest.raises(LayoutError, match="no token"):
        attention_drift(query, keys, keys_read, values, values_read, 1.0, torch.zeros(3, 5, dtype=torch.bool))
