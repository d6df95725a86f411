"""`generate` in its modes: chunked prefill, continued conversations, beams, samples, assisted decoding."""

import copy

import pytest
import torch

from jointkv.hf.cache import JointCache
from jointkv.policy import FusionPolicy
from tests.effort import every_pair
from tests.hf.tiny_models import (
    BLOCK,
    EXACT,
    assert_same_output,
    build_model,
    duplicates,
    generate,
    joint,
    prompts,
    step,
    stock_cache,
)

MODELS = {
    f"{name}-{attention}": (name, attention)
    for name, attention in [("llama", "sdpa"), ("qwen2", "eager"), ("gemma3", "sdpa"), ("gpt2", "sdpa")]
}
POLICIES = {
    "off": "off",
    "exact": EXACT,
    "tokens": FusionPolicy(max_relative_error=0.0, candidates="tokens"),
    "text and signature": FusionPolicy(max_relative_error=0.0, candidates="both"),
    "per_layer": FusionPolicy(max_relative_error=0.0, layer_groups="per_layer"),
    "both": FusionPolicy(max_relative_error=0.0, scope="both", chunk_tokens=2 * BLOCK),
}
NAMES = {name: name for name in POLICIES}


def pair(name, attention, policy):
    stock = build_model(name, attention=attention)
    model, pool = joint(name, POLICIES[policy], attention=attention)
    return stock, model, pool


def padded_duplicates():
    ids, mask = prompts(26, 11)
    return ids.repeat(2, 1), mask.repeat(2, 1)


@every_pair(kind=MODELS, policy=NAMES, chunk={str(chunk): chunk for chunk in (1, 3, BLOCK, 7)})
def test_chunked_prefill(kind, policy, chunk):
    stock, model, pool = pair(*kind, policy)
    expected = generate(stock, padded_duplicates(), stock_cache(stock), prefill_chunk_size=chunk)
    cache = JointCache(pool)
    assert_same_output(expected, generate(model, padded_duplicates(), cache, prefill_chunk_size=chunk))
    cache.check_integrity()
    assert (cache.pages < cache.references) == (policy != "off")
    assert pool.faults == 0


def test_a_chunk_that_is_padding_in_every_row():
    """A prompt padded to a fixed length starts with chunks of padding alone."""
    stock, model, pool = pair("llama", "sdpa", "exact")
    prompt = prompts(12, 9, width=24)
    expected = generate(stock, prompt, stock_cache(stock), prefill_chunk_size=5)
    assert_same_output(expected, generate(model, prompt, JointCache(pool), prefill_chunk_size=5))


@every_pair(kind=MODELS, policy=NAMES)
def test_a_conversation_goes_on_with_its_cache(kind, policy):
    stock, model, pool = pair(*kind, policy)
    caches = stock_cache(stock), JointCache(pool)
    ids, mask = padded_duplicates()
    for turn in range(3):
        expected = generate(stock, (ids, mask), caches[0], tokens=9)
        assert_same_output(expected, generate(model, (ids, mask), caches[1], tokens=9))
        caches[1].check_integrity()
        assert caches[1].get_seq_length() == caches[0].get_seq_length()
        text = prompts(5, seed=turn)[0].repeat(len(ids), 1)
        ids = torch.cat((expected.sequences, text), 1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    assert (caches[1].pages < caches[1].references) == (policy != "off")


@every_pair(kind=MODELS, policy=NAMES, beams={"2": 2, "3": 3})
def test_beams(kind, policy, beams):
    stock, model, pool = pair(*kind, policy)
    for prompt in (prompts(14), prompts(3, 19)):
        options = {"num_beams": beams, "num_return_sequences": beams, "output_scores": True, "tokens": 10}
        expected = generate(stock, prompt, stock_cache(stock), **options)
        cache = JointCache(pool)
        actual = generate(model, prompt, cache, **options)
        assert torch.equal(expected.sequences, actual.sequences)
        assert torch.equal(expected.sequences_scores, actual.sequences_scores)
        cache.check_integrity()
        # Beams share the prompt at the least: nothing is copied but the blocks that they write.
        assert cache.pages < cache.references


@pytest.mark.parametrize("policy", ["off", "exact"])
def test_several_sampled_sequences_of_a_prompt(policy):
    stock, model, pool = pair("llama", "sdpa", policy)
    options = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    expected = generate(stock, prompts(9, 15), stock_cache(stock), **options)
    torch.manual_seed(5)
    cache = JointCache(pool)
    assert_same_output(expected, generate(model, prompts(9, 15), cache, **options))
    assert cache.batch_size == 6 and (cache.pages < cache.references) == (policy != "off")


@pytest.mark.parametrize("policy", POLICIES)
def test_prompt_lookup_crops_what_was_drafted_wrongly(policy):
    stock, model, pool = pair("llama", "sdpa", policy)
    ids, mask = prompts(8)
    prompt = ids.repeat(1, 3), mask.repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 3, "tokens": 30}
    expected = generate(stock, prompt, stock_cache(stock), **options)
    for _ in range(2):
        cache = JointCache(pool)
        assert_same_output(expected, generate(model, prompt, cache, **options))
        cache.check_integrity()


def test_prompts_given_as_embeddings():
    stock, model, pool = pair("llama", "sdpa", "tokens")
    ids, mask = padded_duplicates()
    expected = generate(stock, (ids, mask), stock_cache(stock))
    cache = JointCache(pool)
    actual = model.generate(
        inputs_embeds=model.model.embed_tokens(ids),
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=12,
        do_sample=False,
    )
    assert torch.equal(expected.sequences[:, ids.shape[1] :], actual)
    assert cache.batch.tokens is None and cache.pages < cache.references


def test_masks_given_per_layer_type():
    """Models with several kinds of layers take a dictionary of ready-made masks."""
    model, pool = joint("gemma3", EXACT)
    ids, mask = duplicates(2, 13)
    expected = step(build_model("gemma3"), stock_cache(model), ids, mask)
    causal = torch.ones(13, 13, dtype=torch.bool).tril()
    window = causal & torch.ones(13, 13, dtype=torch.bool).triu(1 - model.config.sliding_window)
    masks = {"full_attention": causal[None, None], "sliding_attention": window[None, None]}
    masks = {name: layer_mask.expand(2, 1, 13, 13) for name, layer_mask in masks.items()}
    actual = step(model, JointCache(pool), ids, masks)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["off", "exact"])
def test_a_copied_cache_is_independent(policy):
    """`copy.deepcopy` of a prefilled prefix cache is transformers' documented way of reusing a prefix."""
    stock, model, pool = pair("llama", "sdpa", policy)
    ids, _ = prompts(18)
    theirs, ours = stock_cache(stock), JointCache(pool)
    step(stock, theirs, ids[:, :10])
    step(model, ours, ids[:, :10])
    for seed in range(2):
        text = torch.cat((ids[:, :10], prompts(6, seed=seed)[0]), 1)
        prompt = (text, torch.ones_like(text))
        expected = generate(stock, prompt, copy.deepcopy(theirs))
        assert_same_output(expected, generate(model, prompt, copy.deepcopy(ours)))
        assert ours.length == 10
        ours.check_integrity()


def test_autograd_modes_may_change_between_steps():
    stock, model, pool = pair("llama", "sdpa", "exact")
    ids, mask = duplicates(2, 40)
    expected = step(stock, stock_cache(stock), ids)[:, -5:]
    cache = JointCache(pool)
    with torch.inference_mode():
        model(input_ids=ids[:, :18], attention_mask=mask[:, :18], past_key_values=cache)
    model(input_ids=ids[:, 18:30], attention_mask=mask[:, :30], past_key_values=cache)
    with torch.inference_mode():
        cache.crop(-3)
        cache.batch_select_indices(torch.tensor([1, 0]))
        model(input_ids=ids[:, 27:35], attention_mask=mask[:, :35], past_key_values=cache)
    actual = step(model, cache, ids[:, 35:], mask)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    assert not any(layer.requires_grad for layer in (*pool.blocks.kv.keys, *pool.blocks.kv.values))
    generate(model, (ids, mask), JointCache(pool))
    pool.check_integrity()
    assert pool.faults == 0
