"""Policies side by side: what is counted, the damage of `paper`, and the goals of `safe` at full size."""

import pytest

pytest.importorskip("jointkv.hf", exc_type=ImportError)  # the environment of the baselines has an older transformers

from jointkv.evaluate.compare.policies import compare_policies
from jointkv.evaluate.holding.prefilled import prefill
from jointkv.evaluate.traffic import get_traffic
from jointkv.hf.models import load_model
from jointkv.policy import FusionPolicy
from tests.evaluate.sharing_requests import BLOCK, requests


def test_rows_stand_against_the_unfused_batch(model):
    batch, lines = prefill(model, requests(6), block_size=BLOCK), []
    unfused, fused = compare_policies(model, batch, {"mine": FusionPolicy(max_relative_error=0.3)}, "toy", lines.append)
    assert lines == ["toy: unfused", "toy: mine"] and (unfused.policy, fused.policy) == ("unfused", "mine")
    assert unfused.ratio == unfused.top1 == 1 and unfused.kl == 0 and unfused.nll == unfused.nll_unfused
    assert fused.ratio == fused.pages_before / fused.pages_after == fused.bytes_before / fused.bytes_after > 1.5
    assert fused.bytes_before == unfused.bytes_after and fused.kl > 0 and fused.nll_unfused == unfused.nll
    assert (fused.requests, fused.scored_tokens) == (6, 36) and fused.prompt_tokens > 6 * 49


def rows_of(traffic, count, policies):
    model, tokenizer = load_model("smollm2", dtype="float32")
    batch = prefill(model, get_traffic(traffic).requests(tokenizer, count))
    return {row.policy: row for row in compare_policies(model, batch, policies, traffic, print)}


@pytest.mark.real_model
def test_unrelated_requests_are_safe_under_safe_and_ruined_under_keys_alone():
    policies = {"safe": FusionPolicy.preset("safe"), "paper": FusionPolicy.preset("paper", key_threshold=0.8)}
    rows = rows_of("unrelated", 8, policies)
    assert rows["safe"].kl <= 0.001
    assert rows["paper"].ratio > 1.2 and rows["paper"].kl > 0.1 and rows["paper"].nll > rows["paper"].nll_unfused + 0.1


@pytest.mark.real_model
@pytest.mark.slow
def test_goals_of_the_demo_at_its_full_size():
    row = rows_of("near_prefix", 24, {"safe": FusionPolicy.preset("safe")})["safe"]
    assert row.ratio >= 3.5 and row.kl <= 0.001 and row.top1 >= 0.99
