"""How far an attacker's pages move a victim, on a tiny model: not at all where it must not, and within theory."""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from influence import attack
from influence_attack import DRIFTS, Target, Victim, search
from jointkv.policy import FusionPolicy

VOCABULARY, BLOCK = 97, 4
HAZARD = pytest.mark.hazard(
    "Side channels",
    "one tenant's content moves another's answer when they share a key",
    "only from blocks within the bound, by no more in any attention row than theory allows, and not at all at bound 0",
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Large enough that the next token depends on what the cache holds.
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(2, VOCABULARY), k=count))


def policies(*bounds: float) -> dict[float, FusionPolicy]:
    return {
        bound: FusionPolicy(max_relative_error=bound, max_token_error=1.5 * bound, candidates="tokens")
        for bound in bounds
    }


@pytest.fixture(scope="module")
def target(model: PreTrainedModel) -> Target:
    victim = Victim(tokens(8, 1), tokens(24, 2), tokens(6, 3))
    return Target(model, victim, policies(0.0, 0.4, 2.0), BLOCK)


@HAZARD
def test_bound_zero_is_immune(target: Target) -> None:
    for state in target.states([tokens(8, seed) for seed in range(10, 14)]):
        outcome = target.serve(state, 0.0)
        assert (outcome.blocks, outcome.mean_kl, outcome.changed) == (0, 0.0, 0.0)


def test_the_same_request_serves_without_harm(target: Target) -> None:
    (state,) = target.states([target.victim.prefix])
    outcome = target.serve(state, 0.0)
    assert outcome.blocks == 8 and outcome.mean_kl == 0.0 and outcome.block_error == 0.0


@HAZARD
def test_errors_are_within_the_bound_and_rows_within_theory(
    target: Target, record_property: Callable[[str, object], None]
) -> None:
    moved = 0.0
    for bound in (0.4, 2.0):
        for state in target.states([tokens(8, seed) for seed in range(20, 24)]):
            outcome = target.serve(state, bound)
            assert outcome.block_error <= bound and outcome.token_error <= 1.5 * bound
            assert (outcome.blocks > 0) == (outcome.mean_kl > 0)
            moved = max(moved, outcome.mean_kl)
            for layer in target.drift(state, bound):
                assert all(getattr(layer, name).holds() for name in DRIFTS)
            record_property("attackers", 1)
    assert moved > 1e-3


def test_rows_are_those_of_the_pages_that_are_read(target: Target) -> None:
    (state,) = target.states([tokens(8, 30)])
    outcome = target.serve(state, 2.0)
    assert outcome.blocks == 6  # those of the shared text; the prefix has other tokens
    shifts = [float(layer.logit_shift.actual.max()) for layer in target.drift(state, 2.0)]
    assert shifts[0] == pytest.approx(0, abs=1e-6)  # K of the first layer knows nothing of the history
    assert min(shifts[1:]) > 1e-3
    assert all(float(layer.logit_shift.actual.max()) == 0 for layer in target.drift(target.own, 0.0))


def test_what_is_served_does_not_outlive_its_trial(target: Target) -> None:
    (state,) = target.states([tokens(8, 31)])
    first = target.serve(state, 2.0)
    assert target.serve(state, 2.0) == first
    pool = target._pools[2.0]
    assert pool.stats()["pages_used"] == 0
    pool.check_integrity()


def test_search_finds_a_planted_prefix() -> None:
    wanted, budget = tuple(random.Random(40).choices(range(2, 12), k=5)), itertools.count()

    def score(prefixes: list[tuple[int, ...]]) -> list[float]:
        for _ in prefixes:
            next(budget)
        return [sum(a == b for a, b in zip(prefix, wanted, strict=True)) for prefix in prefixes]

    best, history = search(score, tokens(5, 41), 0.0, range(2, 12), 400, 8, random.Random(0))
    assert history == sorted(history) and len(history) == 401 and next(budget) == 3200
    assert history[-1] == sum(a == b for a, b in zip(best, wanted, strict=True)) == 5


@HAZARD
def test_whole_experiment(model: PreTrainedModel) -> None:
    arguments = argparse.Namespace(
        bound=[0.0, 2.0],
        prefix_tokens=8,
        shared_tokens=24,
        tail_tokens=6,
        attackers=2,
        generations=3,
        width=4,
        block_size=BLOCK,
        seed=0,
    )
    texts = (tokens(64, 50 + number) for number in itertools.count())
    rows = attack(model, 0, texts, range(2, VOCABULARY), arguments)
    assert [(row["bound"], row["attacker"]) for row in rows] == [
        (bound, kind) for bound in (0.0, 2.0) for kind in ("text", "tokens", "search")
    ]
    for text, drawn, found in (rows[:3], rows[3:]):
        worst = max(text["kl"] + drawn["kl"])
        assert found["history"][0] == pytest.approx(worst, abs=1e-12) and len(found["history"]) == 4
        assert found["kl"][0] == pytest.approx(found["history"][-1], rel=1e-3, abs=1e-9)
        assert all(row["holds"] for row in found["rows"].values())
    assert rows[2]["kl"] == [0.0] and rows[5]["kl"][0] > 0
