"""Gradients through a cache are those of the stock cache, or refused by name; they are never left out."""

import copy

import pytest
import torch

from jointkv.errors import GradientLost
from jointkv.hf.cache import JointCache
from tests.hf.tiny_models import BLOCK, joint, prompts, stock_cache

(PREFIX, MASK), (REST, SEEN) = prompts(2 * BLOCK + 1, BLOCK), prompts(7, 7, seed=2)
POLICIES = ["off", "safe"]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def loss_behind_a_prefix(model, cache):
    with torch.no_grad():
        model(input_ids=PREFIX, attention_mask=MASK, past_key_values=cache)
    mask = torch.cat((MASK, SEEN), 1)
    return model(input_ids=REST, attention_mask=mask, past_key_values=cache, labels=REST).loss


def assert_equal(expected, actual):
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "deepseek_v3"])
def test_behind_a_prefix_without_gradients_all_parameters_have_theirs(name, policy):
    model, pool = joint(name, policy)
    expected = gradients(model, loss_behind_a_prefix(model, stock_cache(model)))
    assert_equal(expected, gradients(model, loss_behind_a_prefix(model, JointCache(pool))))
    pool.check_integrity()


def test_a_whole_prompt_has_the_gradients_of_the_stock_cache():
    model, pool = joint("llama", "safe")
    losses = [model(input_ids=REST, past_key_values=cache, labels=REST).loss for cache in (None, JointCache(pool))]
    assert_equal(*(gradients(model, loss) for loss in losses))


@pytest.mark.parametrize("trained", ["all", "first tokens"])
def test_gradients_of_an_earlier_forward_pass_are_refused_by_name_when_they_are_asked_for(trained):
    """A prefix that is learnt shows in the states of the second pass only through what pages have not kept."""
    model, pool = joint("llama", "off")
    inputs = model.get_input_embeddings()(PREFIX).detach().requires_grad_()
    for parameter in model.parameters():
        parameter.requires_grad_(trained == "all")
    cache = JointCache(pool)
    first = model(inputs_embeds=inputs, past_key_values=cache).logits.sum()
    loss = model(input_ids=REST, past_key_values=cache, labels=REST).loss
    with pytest.raises(GradientLost, match="DynamicCache"):
        loss.backward()
    first.backward()
    assert inputs.grad.any(), "its own graph is whole"


def test_who_never_asks_for_gradients_is_not_disturbed():
    model, pool = joint("llama", "off")
    logits = []
    for cache in (stock_cache(model), JointCache(pool)):
        for ids in (PREFIX, REST, REST[:, :1]):
            last = model(input_ids=ids, past_key_values=cache).logits
        logits.append(last)
    assert torch.equal(*logits)


@pytest.mark.parametrize("again", ["crop", "copy"])
def test_one_prefix_serves_many_answers_that_are_learnt_from(again):
    model, pool = joint("llama", "safe")
    cache = JointCache(pool)
    with torch.no_grad():
        model(input_ids=PREFIX, past_key_values=cache)
    for seed in range(2):
        answer = prompts(5, 5, seed=seed)[0]
        own = copy.deepcopy(cache) if again == "copy" else cache
        theirs = stock_cache(model)
        with torch.no_grad():
            model(input_ids=PREFIX, past_key_values=theirs)
        losses = [model(input_ids=answer, past_key_values=each, labels=answer).loss for each in (theirs, own)]
        assert_equal(*(gradients(model, loss) for loss in losses))
        own.crop(PREFIX.shape[1])
        own.check_integrity()


def test_pages_keep_no_graph_alive():
    model, pool = joint("llama", "safe")
    loss_behind_a_prefix(model, JointCache(pool))
    assert not any(layer.requires_grad for layer in (*pool.blocks.kv.keys, *pool.blocks.kv.values))
