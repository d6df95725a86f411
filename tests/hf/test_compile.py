"""A compiled model answers with `JointCache` as it does without being compiled; bookkeeping stays out of its graphs."""

import gc
import logging

import pytest
import torch
from torch._dynamo.utils import counters

from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from tests.hf.tiny_models import BLOCK, EXACT, build_model, duplicates, step, stock_cache


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def greedy(run, cache, prompt, tokens=5):
    """Tokens and the last logits."""
    ids, mask = prompt
    chosen = []
    for _ in range(tokens):
        logits = step(run, cache, ids, mask)[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        chosen.append(ids)
    return torch.cat(chosen, 1), logits


MIXED = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("name", "of", "changes"),
    [
        ("llama", "compiled", {}),
        ("gemma3", "plain", MIXED),
        # More than torch compiles one by one: a layer's number must not be a part of its graph.
        pytest.param("llama", "compiled", {"num_hidden_layers": 10}, marks=pytest.mark.slow),
    ],
    ids=["llama", "gemma3", "ten layers"],
)
def test_a_compiled_model_answers_as_before(name, of, changes, caplog, capsys):
    caplog.set_level(logging.WARNING, logger="torch._dynamo")
    model = build_model(name, **{"num_hidden_layers": 2, **changes})
    compiled = torch.compile(model, backend="eager")
    pool = JointPool(compiled if of == "compiled" else model, EXACT, block_size=BLOCK)
    graphs = []
    many = torch._dynamo.config.patch(allow_unspec_int_on_nn_module="num_hidden_layers" in changes)
    for seed in range(3):
        prompt = duplicates(2, 2 * BLOCK + 3, seed=seed)
        expected, logits = greedy(model, stock_cache(model), prompt)
        cache = JointCache(pool)
        with many:
            actual, compiled_logits = greedy(compiled, cache, prompt)
        assert torch.equal(actual, expected) and cache.length == 2 * BLOCK + 7
        torch.testing.assert_close(compiled_logits, logits)
        assert cache.pages < cache.references, "blocks are fused"
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[2] == graphs[1], "other requests need no other graphs"
    del cache, compiled
    gc.collect()
    assert not [record for record in caplog.records if "recompile_limit" in record.getMessage()]
    assert "Exception ignored" not in capsys.readouterr().err
    assert model.config._attn_implementation == "sdpa" and pool.faults == 0
    pool.check_integrity()
