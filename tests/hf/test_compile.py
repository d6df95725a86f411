"""A compiled model answers with `JointCache` as it does without being compiled, in one graph for all of its layers."""

import gc
import logging

import pytest
import torch
from torch._dynamo.utils import counters

from jointkv.core.pool import FIRST_PAGES
from jointkv.errors import GradientLost
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.policy import FusionPolicy
from tests.hf.tiny_models import BLOCK, EXACT, build_model, duplicates, generate, joint, prompts, step, stock_cache

MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER = FusionPolicy(max_relative_error=0.0, layer_groups="per_layer")
SMALL = {"num_hidden_layers": 2}


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


def graphs():
    return counters["stats"]["unique_graphs"]


def answers(name, tokens, pool_of="plain", requests=3, **changes):
    """Compare requests with those of the stock cache; returns their pool, and how many graphs there were after each."""
    model = build_model(name, **{**SMALL, **changes})
    compiled = torch.compile(model, backend="eager")
    pool = JointPool(compiled if pool_of == "compiled" else model, EXACT, block_size=BLOCK)
    caches, seen = [], []
    for seed in range(requests):
        prompt = duplicates(2, 2 * BLOCK + 3, seed=seed)
        expected, logits = greedy(model, stock_cache(model), prompt, tokens)
        cache = JointCache(pool)
        actual, compiled_logits = greedy(compiled, cache, prompt, tokens)
        assert torch.equal(actual, expected) and cache.length == 2 * BLOCK + 2 + tokens
        torch.testing.assert_close(compiled_logits, logits)
        assert cache.pages < cache.references, "blocks are fused"
        caches.append(cache)
        seen.append(graphs())
    assert model.config._attn_implementation == "sdpa" and pool.faults == 0
    pool.check_integrity()
    return pool, seen


def test_neither_layers_nor_tokens_nor_growing_pages_ask_for_more_graphs(caplog, capsys):
    """There is a graph of all layers and one of the output layer, for prompts and for tokens, whatever lies where."""
    caplog.set_level(logging.WARNING, logger="torch._dynamo")
    pool, seen = answers("llama", tokens=40, pool_of="compiled", requests=5)
    # The first prompt comes before the pool knows the shapes of pages, so that the second one has another graph.
    assert seen == [4, 5, 5, 5, 5]
    assert pool.blocks.num_pages > FIRST_PAGES, "pages were moved meanwhile"
    assert sum(counters["graph_break"].values()) <= 6, "at the two hooks, none in a layer"
    del pool
    gc.collect()
    assert not [record for record in caplog.records if "recompile_limit" in record.getMessage()]
    assert "Exception ignored" not in capsys.readouterr().err


@pytest.mark.slow
def test_sliding_layers_are_compiled_as_they_are_with_the_stock_cache():
    _, seen = answers("gemma3", tokens=5, **MIXED)
    assert seen[2] == seen[1], "other requests need no other graphs"


@pytest.mark.slow
def test_many_layers_are_one_graph():
    """More than torch compiles one by one: a layer's number is no part of its graph."""
    _, seen = answers("llama", tokens=5, num_hidden_layers=10)
    assert seen == [4, 5, 5]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_padding_and_layers_with_tables_of_their_own_are_compiled(backend):
    """Layers of different groups write to the same tensors then."""
    model = build_model("llama", **SMALL)
    compiled = torch.compile(model, backend=backend)
    pool = JointPool(model, PER_LAYER, block_size=BLOCK)
    prompt = prompts(BLOCK, 2 * BLOCK + 3)
    expected, logits = greedy(model, stock_cache(model), prompt)
    cache = JointCache(pool)
    actual, compiled_logits = greedy(compiled, cache, prompt)
    assert torch.equal(actual, expected) and cache.padding.tolist() == [BLOCK + 3, 0]
    torch.testing.assert_close(compiled_logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_gradients_behind_a_prefix_are_those_without_compiling(backend):
    model, pool = joint("llama", "off", num_hidden_layers=1)
    compiled = torch.compile(model, backend=backend)
    ids, _ = prompts(BLOCK + 3, BLOCK + 3)
    parameter, gradients = model.model.layers[0].self_attn.k_proj.weight, []
    for run, cache in ((model, stock_cache(model)), (compiled, JointCache(pool))):
        step(model, cache, ids[:, :BLOCK])
        run(input_ids=ids[:, BLOCK:], past_key_values=cache, labels=ids[:, BLOCK:]).loss.backward()
        gradients.append(parameter.grad)
        parameter.grad = None
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    loss = compiled(input_ids=ids[:, BLOCK:], past_key_values=cache, labels=ids[:, BLOCK:]).loss
    with pytest.raises(GradientLost):
        loss.backward()


@pytest.mark.slow
def test_beams_of_a_model_compiled_in_place_are_those_without_compiling():
    """Beams move rows and share pages between two steps."""
    model = build_model("llama", **SMALL)
    prompt = prompts(2 * BLOCK + 3, 5)
    expected = generate(model, prompt, stock_cache(model), num_beams=3).sequences
    model.compile(backend="eager")
    pool = JointPool(model, EXACT, block_size=BLOCK)
    for _ in range(2):
        assert torch.equal(generate(model, prompt, JointCache(pool), num_beams=3).sequences, expected)
    pool.check_integrity()


@pytest.mark.slow
def test_autocast_and_own_norms_are_compiled():
    """Pages are wider than the states there, and tokens are scaled as they are read."""
    model = build_model("llama", **SMALL)
    compiled = torch.compile(model, backend="eager")
    prompt = duplicates(2, 3 * BLOCK)
    for policy in ("off", FusionPolicy.preset("paper", skip_first_layers=0, skip_last_layers=0)):
        logits = []
        for run in (model, compiled):
            pool = JointPool(model, policy, block_size=BLOCK)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits.append(greedy(run, JointCache(pool), prompt)[1])
            assert pool.blocks.kv.dtype == torch.float32 and pool.faults == 0
        torch.testing.assert_close(*logits, rtol=2e-2, atol=2e-2)
