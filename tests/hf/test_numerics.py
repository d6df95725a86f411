"""Dtypes, sizes of numbers, lengths at the model's limit: answers are the stock cache's, or the refusal is named."""

import copy

import pytest
import torch

from jointkv.attention.reference import paged_attention
from jointkv.attention.tokens import token_slots
from jointkv.core.plan import BlockRef
from jointkv.errors import LayoutError
from jointkv.hf.attention import PagedLayer
from jointkv.hf.cache import JointCache
from jointkv.hf.layer import PagedCacheLayer
from jointkv.policy import FusionPolicy
from tests.hf.tiny_models import (
    BLOCK,
    EXACT,
    assert_same_output,
    build_model,
    duplicates,
    feed,
    generate,
    joint,
    step,
    stock_cache,
)

LIMIT = 6 * BLOCK
SHAPE = (3, 2, 2 * BLOCK, 8)
"""Rows, heads, tokens and head size of synthetic states."""

same_answers = pytest.mark.hazard(
    "Numerics", "identical requests in fp32, bf16 or fp16, fused at bound 0", "tokens and logits equal to the last bit"
)
refusal = pytest.mark.hazard(
    "Numerics",
    "pages of a dtype that was never compared (fp8 in transformers, int8, float64, foreign fp8 formats)",
    "refused by name before any number is computed",
)
at_the_limit = pytest.mark.hazard(
    "Numerics", "a prompt as long as the model's context, or one token longer", "answers are those without jointkv"
)
repeatable = pytest.mark.hazard("Numerics", "the same requests come again", "equal tables, tokens and counters")
extremes = pytest.mark.hazard(
    "Numerics", "K and V are huge, denormal, zero or hold a sink", "attention reads them unchanged, or within the bound"
)


def pages_of_equal_blocks(stock, layers):
    """Pages for full blocks that differ in some bit, and for every last one: a processor may round rows differently."""
    sides = [side for layer in layers for side in (stock.layers[layer].keys, stock.layers[layer].values)]
    tokens = torch.cat([side.float().transpose(1, 2).flatten(2) for side in sides], 2)
    rows, length = tokens.shape[:2]
    full = tokens[:, : length // BLOCK * BLOCK].unflatten(1, (-1, BLOCK)).flatten(2)
    return sum(len(blocks.unique(dim=0)) for blocks in full.unbind(1)) + rows * (length % BLOCK > 0)


@same_answers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_identical_requests(name, dtype):
    prompt = duplicates(3, 4 * BLOCK + 2)
    stock = build_model(name, dtype)
    unfused = stock_cache(stock)
    expected = generate(stock, prompt, unfused, tokens=BLOCK)
    model, pool = joint(name, EXACT, dtype=dtype)
    cache = JointCache(pool)
    assert_same_output(expected, generate(model, prompt, cache, tokens=BLOCK))
    paged = [number for number, layer in enumerate(cache.layers) if isinstance(layer, PagedCacheLayer)]
    assert pool.faults == 0 and cache.pages == pages_of_equal_blocks(unfused, paged) < cache.references


@refusal
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.int8], ids=str)
def test_states_of_other_dtypes(dtype):
    _, pool = joint("llama", EXACT)
    cache = JointCache(pool)
    states = torch.ones(3, *SHAPE).to(dtype)
    with pytest.raises(LayoutError, match=str(dtype)):
        feed(cache, states, states)
    assert pool.blocks is None and cache.references == 0
    feed(cache, torch.ones(3, *SHAPE), torch.ones(3, *SHAPE))
    assert cache.pages < cache.references
    with pytest.raises(LayoutError, match=str(dtype)):
        feed(cache, states, states)
    assert cache.get_seq_length() == SHAPE[2]


@refusal
def test_a_model_in_float64():
    model, pool = joint("llama", EXACT, dtype=torch.float64)
    seen = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    with pytest.raises(LayoutError, match=r"torch\.float64"):
        step(model, JointCache(pool), *duplicates(2, 9))
    assert not seen, "no layer came to an end"


@at_the_limit
@pytest.mark.parametrize("chunks", [[LIMIT], [LIMIT - 1, 1], [3, LIMIT - 3]], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_prompt_of_exactly_the_limit(name, chunks):
    stock = build_model(name, max_position_embeddings=LIMIT)
    model, pool = joint(name, EXACT, max_position_embeddings=LIMIT)
    theirs, ours = stock_cache(stock), JointCache(pool)
    for ids in duplicates(2, LIMIT)[0].split(chunks, 1):
        assert torch.equal(step(stock, theirs, ids), step(model, ours, ids))
    assert ours.get_seq_length() == LIMIT and pool.faults == 0
    assert ours.pages == len(ours.tables) * LIMIT // BLOCK


@at_the_limit
def test_one_token_more_than_the_limit_fails_as_without_jointkv():
    """gpt2 has no position to give it. The cache can still be cropped and read on."""
    stock = build_model("gpt2", max_position_embeddings=LIMIT)
    model, pool = joint("gpt2", EXACT, max_position_embeddings=LIMIT)
    theirs, ours = stock_cache(stock), JointCache(pool)
    ids = duplicates(2, LIMIT + 1)[0]
    for each, cache in ((stock, theirs), (model, ours)):
        step(each, cache, ids[:, :LIMIT])
        with pytest.raises(IndexError):
            each(input_ids=ids[:, LIMIT:], past_key_values=cache)
    assert ours.get_seq_length() == LIMIT
    ours.check_integrity()
    for cache in (theirs, ours):
        cache.crop(-3)
    assert torch.equal(step(stock, theirs, ids[:, :3]), step(model, ours, ids[:, :3]))


@repeatable
@pytest.mark.parametrize("policy", ["safe", "paper"])
def test_two_runs_are_equal(policy):
    found = []
    for _ in range(2):
        model, pool = joint(
            "llama", FusionPolicy.preset(policy, max_relative_error=0.6, max_token_error=None), num_hidden_layers=6
        )
        caches = [JointCache(pool) for _ in range(3)]
        for number, cache in enumerate(caches):
            ids, mask = duplicates(2, 5 * BLOCK)
            ids[:, 0] = torch.tensor([number, number + 3]) + 2
            found_tokens = generate(model, (ids, mask), cache, tokens=2 * BLOCK).sequences
        stats = {name: value for name, value in pool.stats().items() if name != "seconds_fusing"}
        tables = [copy.deepcopy((table.pages, table.served, table.k_scale)) for c in caches for table in c.tables]
        found.append((found_tokens, stats, tables))
    (tokens, stats, tables), (again, same_stats, same_tables) = found
    assert torch.equal(tokens, again) and stats == same_stats and stats["blocks_fused"] > 5
    for one, other in zip(tables, same_tables, strict=True):
        assert all(torch.equal(a, b) if a is not None else b is None for a, b in zip(one, other, strict=True))


def read(cache, side):
    """What attention gets for all rows: `[layers, rows, h, tokens, d]`."""
    kv, (table,) = cache.pool.blocks.kv, cache.tables
    slots = token_slots(table.pages, BLOCK, cache.padding, cache.length)
    layers = [PagedLayer(kv.keys[i], kv.values[i], slots, *cache.batch.scales(0, i)) for i in range(kv.num_layers)]
    return torch.stack([layer.read()[side] for layer in layers])


@extremes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["zero", "denormal", "huge", "sink"])
def test_extreme_states(dtype, kind):
    """Rows 0 and 1 are equal; row 2 is the negative."""
    info = torch.finfo(dtype)
    scale = {"zero": 0.0, "denormal": info.tiny * info.eps, "huge": info.max / 8, "sink": 1.0}[kind]
    states = torch.randint(1, 8, (3, *SHAPE), generator=torch.Generator().manual_seed(0)).double()
    states[:, 1], states[:, 2] = states[:, 0], -states[:, 0]
    if kind == "sink":
        states[:, :, :, 0] = 1000
    states = (scale * states).to(dtype)
    _, pool = joint("llama", FusionPolicy())
    cache = JointCache(pool)
    feed(cache, states, states)
    assert pool.faults == 0
    for side in (0, 1):
        assert torch.equal(read(cache, side), states)
    # Equal numbers too large to square are not looked for in one batch: that costs pages, never answers.
    distinct = {"zero": 1, "huge": 2 if dtype == torch.float16 else 3}.get(kind, 2)
    assert cache.pages == distinct * SHAPE[2] // BLOCK


@extremes
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16], ids=str)
def test_the_reference_attention_reads_any_format(dtype):
    """Pages of fewer bits are the numbers they stand for, and a sink's logit overflows nothing."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(4, BLOCK, 2, 8, generator=generator) for _ in range(2))
    keys[1, 0] *= 100
    keys, values = keys.to(dtype), values.to(dtype)
    query = torch.randn(3, 4, 8, generator=generator)
    table = [BlockRef(1, 2.0, 0.5, count=BLOCK), BlockRef(3, count=BLOCK), BlockRef(2, count=2)]
    output, log_sum = paged_attention(query, [3], keys, values, [table])
    expected = paged_attention(query, [3], keys.float(), values.float(), [table])
    assert torch.equal(output, expected[0]) and torch.equal(log_sum, expected[1])
    assert output.isfinite().all() and log_sum.abs().max() > 20
