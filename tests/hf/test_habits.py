"""What people do with caches of transformers in their own loops works with a `JointCache` too."""

import copy

import pytest
import torch

from jointkv.hf.cache import JointCache
from tests.hf.tiny_models import BLOCK, assert_same_output, generate, joint, prompts, step, stock_cache


def test_a_cache_is_no_module():
    """Kept by a model it is none of its parts: nothing of it is saved, moved or trained with the model."""
    model, pool = joint("llama", "safe")
    names = set(model.state_dict())
    model.prompt_cache = JointCache(pool)
    step(model, model.prompt_cache, prompts(9)[0])
    assert not isinstance(model.prompt_cache, torch.nn.Module)
    assert set(model.state_dict()) == names
    model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_that_was_computed_with_gradients_can_be_copied_for_each_question(name):
    model, pool = joint(name, "safe")
    prompt, _ = prompts(3 * BLOCK)
    caches = stock_cache(model), JointCache(pool)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=caches[0])
    model(input_ids=prompt, past_key_values=caches[1])
    for seed in range(3):
        ids = torch.cat((prompt, prompts(5, seed=seed)[0]), 1)
        answers = [generate(model, (ids, torch.ones_like(ids)), copy.deepcopy(cache), tokens=4) for cache in caches]
        assert_same_output(*answers)
    assert caches[1].length == 3 * BLOCK


@pytest.mark.parametrize("policy", ["off", "safe"])
def test_a_prompt_that_was_computed_once_serves_endings_of_unequal_length_with_padding_between(policy):
    model, pool = joint("llama", policy)
    prompt, _ = prompts(2 * BLOCK + 1)
    endings, mask = prompts(6, 3, seed=2)
    ids = torch.cat((prompt.repeat(2, 1), endings), 1)
    mask = torch.cat((torch.ones_like(ids)[:, : prompt.shape[1]], mask), 1)
    answers = []
    for cache in (stock_cache(model), JointCache(pool)):
        step(model, cache, prompt)
        cache.batch_repeat_interleave(2)
        answers.append(generate(model, (ids, mask), cache, tokens=4))
    assert_same_output(*answers)


def test_the_output_has_the_very_cache_that_was_given():
    model, pool = joint("llama", "off")
    cache = JointCache(pool)
    ids, mask = prompts(9)
    assert model(input_ids=ids, past_key_values=cache).past_key_values is cache
    assert generate(model, (ids, mask), JointCache(pool), tokens=2).past_key_values.pool is pool


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_loop_that_feeds_one_token_after_another(mode):
    model, pool = joint("llama", "safe")
    ids, mask = prompts(9, 5)
    expected = generate(model, (ids, mask), stock_cache(model), tokens=2 * BLOCK).sequences[:, 9:]
    cache, given, chosen = JointCache(pool), ids, []
    with mode():
        for _ in range(2 * BLOCK):
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -given.shape[1] :]
            logits = model(input_ids=given, attention_mask=mask, position_ids=position, past_key_values=cache).logits
            given = logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            chosen.append(given)
    assert torch.equal(torch.cat(chosen, 1), expected)
    cache.check_integrity()
