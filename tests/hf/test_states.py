"""Whatever dtype, device or strides the model hands over: pages keep their own, or refuse by name."""

import pytest
import torch

from jointkv.errors import LayoutError
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from tests.hf.tiny_models import (
    BLOCK,
    assert_same_output,
    build_model,
    duplicates,
    feed,
    generate,
    joint,
    prompts,
    step,
    stock_cache,
)

SHAPE = (3, 2, 2, 2 * BLOCK, 8)
"""Of K or V: layers, rows, heads, tokens, numbers."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_answers_under_autocast_are_those_of_the_stock_cache(name, dtype):
    model, pool = joint(name, "off")
    for prompt in (prompts(9, 17), duplicates(2, 4 * BLOCK)):
        with torch.autocast("cpu", dtype=dtype):
            expected = generate(model, prompt, stock_cache(model))
            assert_same_output(expected, generate(model, prompt, JointCache(pool)))
    assert pool.blocks.kv.dtype == torch.float32 and pool.faults == 0
    pool.check_integrity()


def test_a_prefill_under_autocast_is_that_of_the_stock_cache():
    """It was computed in the model's dtype instead, and what a pool has of both is compared with each other."""
    model = build_model("llama")
    pool = JointPool(model, "safe", block_size=BLOCK, reuse="probed")
    ids, mask = prompts(3 * BLOCK)
    caches = stock_cache(model), JointCache(pool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            model(input_ids=ids[:, :-1], past_key_values=caches[0])
        caches[1].prefill(model, ids)
        for stock, layer in zip(caches[0].layers, caches[1].layers, strict=True):
            assert torch.equal(stock.keys.float(), layer.keys) and torch.equal(stock.values.float(), layer.values)
        losses = [
            model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache).logits.sum() for cache in caches
        ]
    for loss in losses:
        model.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("first", [True, False], ids=["autocast first", "autocast later"])
def test_autocast_may_begin_and_end_between_two_steps(first):
    model, pool = joint("llama", "off")
    ids, mask = prompts(9, 17)
    logits = []
    for cache in (stock_cache(model), JointCache(pool)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
            step(model, cache, ids[:, :12], mask[:, :12])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first):
            step(model, cache, ids[:, 12:16], mask[:, :16])
        logits.append(step(model, cache, ids[:, 16:], mask))
    torch.testing.assert_close(*logits, rtol=2e-2, atol=2e-2)


def test_blocks_are_compared_exactly_under_autocast():
    """Rounded to 16 bits, the errors of equal decisions would differ, and a bound would not be kept."""
    counted = []
    for enabled in (False, True):
        _, pool = joint("llama", "safe")
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(SHAPE, generator=generator)
        base[:, 1] = base[:, 0] + 0.1 * torch.randn(SHAPE, generator=generator)[:, 0]
        cache = JointCache(pool)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            feed(cache, base, base)
        counted.append([table.pages.tolist() for table in cache.tables])
    assert counted[0] == counted[1]


def test_pages_have_the_dtype_of_the_model_and_take_what_loses_nothing_in_it():
    _, pool = joint("llama", "off")
    states = torch.randn(SHAPE)
    cache = JointCache(pool)
    feed(cache, states.bfloat16(), states.half())
    assert pool.blocks.kv.dtype == torch.float32
    key, value = cache.layers[0].update(states[0].bfloat16(), states[0])
    assert (key.dtype, value.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(key, states[0].bfloat16().repeat(1, 1, 2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_states_that_would_lose_in_the_pages_are_refused(dtype):
    _, pool = joint("llama", "off", dtype=torch.bfloat16)
    feed(JointCache(pool), *(torch.ones(SHAPE, dtype=torch.bfloat16),) * 2)
    other = JointCache(pool)
    with pytest.raises(LayoutError, match=f"{dtype} do not fit pages of torch.bfloat16"):
        other.layers[0].update(*(torch.ones(SHAPE[1:], dtype=dtype),) * 2)
    assert other.pages == 0
    pool.check_integrity()


@pytest.mark.parametrize("side", [0, 1])
def test_states_on_another_device_are_refused(side):
    _, pool = joint("llama", "off")
    feed(JointCache(pool), torch.ones(SHAPE), torch.ones(SHAPE))
    states, cache = [torch.ones(SHAPE[1:]), torch.ones(SHAPE[1:])], JointCache(pool)
    states[side] = states[side].to("meta")
    with pytest.raises(LayoutError, match="on meta do not fit pages on cpu"):
        cache.layers[0].update(*states)
    pool.check_integrity()


def test_strides_do_not_matter():
    _, pool = joint("llama", "off")
    rows, heads, tokens, size = SHAPE[1:]
    laid_out = [
        torch.randn(rows, 1, tokens, size).expand(rows, heads, tokens, size),
        torch.randn(rows, tokens, heads, size).transpose(1, 2),
        torch.randn(rows, heads, size, tokens).mT,
        torch.randn(rows, heads, tokens, 2 * size)[..., ::2],
    ]
    for key in laid_out:
        for value in laid_out:
            cache = JointCache(pool)
            for _ in range(2):
                read = cache.layers[0].update(key, value)
            assert all(torch.equal(side, new.repeat(1, 1, 2, 1)) for side, new in zip(read, (key, value), strict=True))
