"""What `jointkv demo` measures, on the real model: the damage of `paper`, and the goals of `safe` at full size."""

import pytest
import torch

from jointkv.evaluate.compare.policies import compare_policies
from jointkv.evaluate.holding.fused import regroup
from jointkv.evaluate.holding.prefilled import left_padded, prefill
from jointkv.evaluate.traffic import get_traffic
from jointkv.hf.models import load_model
from jointkv.policy import FusionPolicy


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


def test_left_padding():
    ids, mask = left_padded([(5, 6, 7), (8,)], pad=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_regrouped_pages_hold_the_same_blocks():
    layers, pages = 4, 3
    state = {f"{side}.{i}": torch.rand(pages, 2, 1, 2) for side in ("key", "value") for i in range(layers)}
    state |= {"table.0": torch.tensor([[0, 2, -1], [1, 1, 0]]), "padding": torch.zeros(2)}
    state["served.0"] = state["table.0"] < -1
    grouped = regroup(state, layers_per_group=2)
    assert grouped["key.0"].shape[0] == 2 * pages and torch.equal(grouped["padding"], state["padding"])
    for layer in range(layers):
        group, member = divmod(layer, 2)
        table = grouped[f"table.{group}"]
        assert torch.equal(table < 0, state["table.0"] < 0)
        for side in ("key", "value"):
            held = grouped[f"{side}.{member}"][table[table >= 0]]
            assert torch.equal(held, state[f"{side}.{layer}"][state["table.0"][state["table.0"] >= 0]])
