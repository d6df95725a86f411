"""A model is switched to reading pages for the forward passes of a `JointCache`, and is what it was otherwise."""

import gc

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from jointkv.errors import PoolFull
from jointkv.hf.attention import ATTENTION_NAME
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from tests.hf.tiny_models import build_model, generate, joint, prompts, step


def attentions(model):
    return {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}


@pytest.mark.parametrize("attention", ["sdpa", "eager", ATTENTION_NAME])
def test_attention_is_what_it_was_after_each_forward_pass(attention):
    model = build_model("llama", attention="eager")
    pool = JointPool(model)
    model.set_attn_implementation(attention)
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(attentions(model)))
    cache = JointCache(pool)
    generate(model, prompts(5), cache, tokens=2)
    assert attentions(model) == {attention}
    assert seen == [{ATTENTION_NAME if attention == "sdpa" else attention}] * 2
    del cache, pool
    gc.collect()
    step(model, None, prompts(5)[0])
    assert seen[-1] == attentions(model) == {attention}


@pytest.mark.parametrize("fault", ["full pool", "model"])
def test_attention_is_restored_when_a_forward_pass_breaks_off(fault):
    model, pool = joint("llama", "off", max_pages=1)
    if fault == "model":
        model.model.layers[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(PoolFull if fault == "full pool" else MemoryError):
        step(model, JointCache(pool), prompts(9 if fault == "full pool" else 2)[0])
    assert attentions(model) == {"sdpa"}


@pytest.mark.parametrize("pass_after", ["without a cache", "in another pool"])
def test_attention_is_restored_by_the_next_forward_pass_after_an_interrupt(pass_after):
    """No hook of torch is called then."""
    model, pool = joint("llama", "off")
    interrupt = model.model.layers[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        step(model, JointCache(pool), prompts(2)[0])
    interrupt.remove()
    step(model, None if pass_after == "without a cache" else JointCache(JointPool(model)), prompts(2)[0])
    assert attentions(model) == {"sdpa"}


def test_attention_that_was_chosen_after_an_interrupt_stays():
    model, pool = joint("llama", "off")
    pool.attention.on()
    model.set_attn_implementation("eager")
    step(model, JointCache(pool), prompts(2)[0])
    assert attentions(model) == {"eager"}


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_serves_a_model_that_has_a_pool():
    model, pool = joint("llama", "safe", attention="sdpa")
    ids, mask = prompts(9)
    expected = generate(model, (ids, mask), JointCache(pool), tokens=4).sequences[0, 9:]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    answers = model.generate_batch(
        ids.tolist(), generation_config=config, continuous_batching_config=small, warmup=False
    )
    assert [answer.generated_tokens for answer in answers.values()] == [expected.tolist()]
    assert attentions(model) == {"sdpa"}


def test_a_model_with_a_pool_can_be_saved_and_loaded(tmp_path):
    model, _ = joint("llama")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert attentions(loaded) == {"sdpa"}
    assert torch.equal(step(model, None, prompts(5)[0]), step(loaded, None, prompts(5)[0]))
