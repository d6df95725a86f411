"""A batch on fused pages."""

import torch

from jointkv.evaluate.holding.fused import regroup


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
