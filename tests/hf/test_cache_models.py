"""Supported models answer with `JointCache` as with the stock cache; the others are refused by name."""

import pytest
import torch

from jointkv.errors import UnsupportedModel
from jointkv.hf.cache import JointCache
from jointkv.hf.layer import PagedCacheLayer
from tests.effort import every_pair
from tests.hf.tiny_models import (
    EXACT,
    assert_same_output,
    build_model,
    duplicates,
    generate,
    joint,
    prompts,
    stock_cache,
)

SDPA = ["llama", "qwen2", "mistral", "gemma", "gemma3", "gemma3n", "gemma4", "gpt2"]
CASES = [(name, "sdpa") for name in SDPA] + [(name, "eager") for name in (*SDPA, "gemma2", "neox_japanese")]
PROMPTS = {
    "single": prompts(21),
    "batch": prompts(16, 16, 16),
    "padded": prompts(2, 19, 40, 33),
    "one_token": prompts(1),
    "duplicates": duplicates(3, 18),
    "padded_duplicates": tuple(torch.cat((part, part)) for part in prompts(23, 9)),
}


@every_pair(
    kind={f"{name}-{attention}": (name, attention) for name, attention in CASES},
    policy={"off": "off", "exact": EXACT},
    prompt={name: name for name in PROMPTS},
)
def test_answers_are_those_of_the_stock_cache(kind, policy, prompt):
    name, attention = kind
    stock = build_model(name, attention=attention)
    expected = generate(stock, PROMPTS[prompt], stock_cache(stock))
    model, pool = joint(name, policy, attention=attention)
    cache = JointCache(pool)
    assert_same_output(expected, generate(model, PROMPTS[prompt], cache))
    assert bool(pool.page_readers) == (attention == "sdpa")
    cache.check_integrity()
    if policy == "off":
        assert cache.pages == cache.references and pool.stats()["fusion"] == "off"
    if policy is EXACT and "duplicates" in prompt:
        assert cache.pages < cache.references
        assert pool.stats()["pages_freed"] == pool.stats()["blocks_fused"] > 0
    assert pool.faults == 0
    del cache
    assert pool.stats()["pages_used"] == 0


@pytest.mark.parametrize("policy", ["off", EXACT], ids=["off", "exact"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_bfloat16_answers_are_those_of_the_stock_cache(name, attention, policy):
    stock = build_model(name, torch.bfloat16, attention)
    model, pool = joint(name, policy, dtype=torch.bfloat16, attention=attention)
    for prompt in ("padded", "duplicates"):
        expected = generate(stock, PROMPTS[prompt], stock_cache(stock))
        assert_same_output(expected, generate(model, PROMPTS[prompt], JointCache(pool)))
        pool.check_integrity()
    assert pool.blocks.kv.keys[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["deepseek_v3", "jetmoe", "diffllama"])
@pytest.mark.parametrize("prompt", ["single", "padded"])
def test_attention_that_changes_k_or_v_after_the_cache_never_answers_wrongly(name, prompt):
    """These expand or recombine K or V behind the cache, so pages that ride on the keys do not arrive."""
    stock = build_model(name)
    expected = generate(stock, PROMPTS[prompt], stock_cache(stock))
    try:
        model, pool = joint(name)
        actual = generate(model, PROMPTS[prompt], JointCache(pool))
    except UnsupportedModel:
        return
    assert_same_output(expected, actual)


def test_modernbert_decoder_is_noticed_step_by_step():
    """Its attribute `decoder` is the output layer, not the module whose forward passes must be watched."""
    model, pool = joint("modernbert_decoder", EXACT)
    cache = JointCache(pool)
    generate(model, PROMPTS["padded_duplicates"], cache)
    assert cache.padding.tolist() == [0, 14, 0, 14]
    assert cache.pages < cache.references


def test_other_caches_of_the_model_are_not_affected():
    stock = build_model("llama")
    model, _ = joint("llama", "safe")
    for prompt in PROMPTS.values():
        expected = generate(stock, prompt, stock_cache(stock))
        assert_same_output(expected, generate(model, prompt, stock_cache(model)))
        assert torch.equal(stock(*prompt).logits, model(*prompt).logits)


def test_soft_capping_is_refused_by_name_unless_eager():
    try:
        stock = build_model("gemma2")
    except ValueError as error:
        pytest.skip(f"this release refuses the stock attention first: {error}")
    expected = generate(stock, PROMPTS["single"], stock_cache(stock))
    model, pool = joint("gemma2")
    with pytest.raises(UnsupportedModel, match=r"softcap.*eager"):
        generate(model, PROMPTS["single"], JointCache(pool))
    # What the pool refuses must go on working with another cache.
    assert_same_output(expected, generate(model, PROMPTS["single"], stock_cache(model)))


def test_sliding_layers_keep_their_own_cache():
    model, pool = joint("gemma3", "safe")
    kinds = [isinstance(layer, PagedCacheLayer) for layer in JointCache(pool).layers]
    assert kinds == [False, True, False, True] and pool.full_layers == [1, 3]
    cache = JointCache(pool)
    generate(model, PROMPTS["duplicates"], cache)
    assert cache.layers[0].keys.shape[2] == model.config.sliding_window - 1
    assert cache.pages < cache.references


def test_a_saved_use_cache_false_does_not_make_a_model_unsupported():
    """Checkpoints trained with gradient checkpointing carry `use_cache: false`."""
    model, pool = joint("llama", use_cache=False)
    stock = build_model("llama", use_cache=False)
    expected = generate(stock, PROMPTS["batch"], stock_cache(stock), use_cache=True)
    assert_same_output(expected, generate(model, PROMPTS["batch"], JointCache(pool), use_cache=True))
