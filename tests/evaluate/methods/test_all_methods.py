"""What every method promises, whichever it is; those whose packages are missing are skipped."""

import math
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version

from jointkv.errors import BadInput, UnsupportedModel
from jointkv.evaluate.compare.comparison import run_methods
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.held import true_logits
from jointkv.evaluate.methods import Fused, get_method, method_names
from jointkv.policy import FusionPolicy
from tests.evaluate.methods.tiny_batches import BLOCK, batch_of, different, same_start

LOSSLESS = {
    "unfused": 1.0,
    "exact_prefix": 1.0,
    "fused": 0.0,
    "reuse": 0.0,
    "reuse_moved": 0.0,
    "epic": 512.0,
    "cache_blend": 1.0,
    "minicache": 0.0,
    "semantic": 1.0,
}
LOSSLESS |= dict.fromkeys(("snapkv", "expected_attention", "knorm", "tova", "streaming_llm"), 1.0)
ON_PAGES = ("exact_prefix", "fused", "paper", "reuse", "reuse_moved", "fused_quantized", "quantized_pages")
ON_PAGES += ("full_reuse", "epic", "cache_blend")


def runnable(name):
    method = get_method(name)
    if method.missing_packages():
        pytest.skip(f"needs {', '.join(method.missing_packages())}")
    if name in ON_PAGES and Version(transformers.__version__) < Version("5.16"):
        pytest.skip("jointkv.hf needs a later transformers")
    if name == "kvzip":
        pytest.skip("needs a tokenizer; see test_pressed.py")
    return method


@pytest.mark.parametrize("name", method_names())
def test_tokens_fed_one_by_one_or_at_once_give_the_same_logits(name):
    method, batch = runnable(name), batch_of(same_start())
    tokens = torch.tensor([request.prompt[-1:] + request.continuation for request in batch.requests])
    level = method.levels[0]
    at_once = method.hold(batch, level).feed(tokens)
    held = method.hold(batch, level)
    one_by_one = torch.cat([held.feed(tokens[:, i : i + 1]) for i in range(tokens.shape[1])], 1)
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", method_names())
def test_a_fork_is_fed_on_its_own_and_changes_nothing_here(name):
    method, batch = runnable(name), batch_of(same_start())
    expected = true_logits(method.hold(batch, method.levels[0]), batch.requests)
    held = method.hold(batch, method.levels[0])
    twin = held.fork()
    torch.testing.assert_close(true_logits(twin, batch.requests), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(true_logits(held, batch.requests), expected, rtol=1e-3, atol=1e-3)
    assert held.model is batch.model and twin.nbytes == held.nbytes


@pytest.mark.parametrize("name", LOSSLESS)
def test_at_its_lossless_end_nothing_changes(name):
    method = runnable(name)
    (row,) = run_methods(batch_of(different()), [(method, LOSSLESS[name])], generate=4)
    assert row.not_run is None
    assert row.kl_worst_request < 1e-6 and row.top1 == 1 and row.common_prefix == 4
    assert 1 <= row.share < 1.1  # a started block counts whole at an allocator


@pytest.mark.parametrize("name", method_names())
def test_bytes_fall_with_the_level(name):
    method = runnable(name)
    batch = batch_of(same_start(), num_hidden_layers=8)
    held = [method.hold(batch, level) for level in method.levels]
    sizes = [each.nbytes for each in held]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    assert all(0 <= each.nbytes_packed <= each.nbytes for each in held)


def test_batch_keeps_what_it_prefilled():
    batch = batch_of(same_start())
    before = [layer.keys.clone() for layer in batch.dense[0].layers]
    for name in ("unfused", "minicache", "semantic"):
        method = get_method(name)
        true_logits(method.hold(batch, method.levels[-1]), batch.requests)
    assert all(torch.equal(kept, layer.keys) for kept, layer in zip(before, batch.dense[0].layers, strict=True))


def test_a_released_batch_is_prefilled_again_when_it_is_asked_for():
    batch = batch_of(different(rows=2))
    held = get_method("unfused").hold(batch, 1.0)
    before = batch.dense
    batch.release()
    assert "dense" not in vars(batch) and batch.dense is not before
    torch.testing.assert_close(
        true_logits(held, batch.requests), true_logits(get_method("unfused").hold(batch, 1.0), batch.requests)
    )


@pytest.mark.parametrize("name", method_names())
def test_a_model_with_sliding_windows_is_refused(name):
    config = transformers.MistralConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        sliding_window=8,
    )
    batch = Batch(transformers.MistralForCausalLM(config).eval(), different(), BLOCK)
    method = get_method(name)
    with pytest.raises(UnsupportedModel, match="MistralForCausalLM has layers with a DynamicSlidingWindowLayer"):
        method.hold(batch, method.levels[0])


REFUSED = {
    "unfused": (0.5, 2.0),
    "exact_prefix": (0.0,),
    "fused": (-0.1, math.inf),
    "reuse": (-0.1, math.inf),
    "reuse_moved": (-0.1, math.inf),
    "full_reuse": (0.0,),
    "epic": (-1.0, math.inf),
    "cache_blend": (-0.1, 1.1),
    "paper": (-1.1, 1.1),
    "minicache": (-0.1, 1.1),
    "semantic": (-1.1, 1.1),
    **dict.fromkeys(("fused_quantized", "quantized_pages", "quantized"), (3.0, 4.5, 0.0, 16.0)),
    **dict.fromkeys(("snapkv", "expected_attention", "knorm", "tova", "streaming_llm", "kvzip"), (0.0, 1.01, -0.5)),
}


@pytest.mark.parametrize("name", method_names())
def test_levels_that_make_no_sense_are_refused(name):
    method = get_method(name)
    for level in method.levels:
        method.check_level(level)
    for level in (*REFUSED[name], math.nan):
        with pytest.raises(BadInput, match=rf"{name}: level {level:g} \(.*\); allowed: "):
            method.hold(batch_of(different(rows=1)), level)


def test_a_policy_is_held_at_its_own_level_only():
    method = Fused("mine", FusionPolicy.preset("safe", max_relative_error=0.1))
    method.check_level(0.1)
    with pytest.raises(BadInput, match=r"mine: level 0.2 .*; allowed: that of the policy, 0.1"):
        method.check_level(0.2)


def test_names():
    assert len(set(method_names())) == len(method_names()) >= 15
    assert get_method("fused-quantized") is get_method("fused_quantized")
    with pytest.raises(BadInput, match="unknown method 'magic'; known: unfused"):
        get_method("magic")


def test_methods_import_without_the_newer_transformers():
    found = "[name for name in sys.modules if name.startswith(('jointkv.hf', 'kvpress'))]"
    code = f"import sys, jointkv.evaluate.compare.other_environment; print({found})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
