"""What was computed in training mode, or under another autocast, is read by nobody who computes other numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jointkv.errors import UnsupportedUse
from jointkv.hf.cache import JointCache
from jointkv.hf.modes import evaluating, in_training
from jointkv.hf.rotary import rotary_of
from jointkv.hf.stored import prefill_pages
from tests.hf.reusing import dense, near, next_logits, padded, prefill, reusing, text
from tests.hf.tiny_models import BLOCK, build_model, generate, stock_cache

SHARED = text(8 * BLOCK, 7)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def with_dropout() -> nn.Module:
    """Half of each embedding is left out in training."""
    model = build_model("llama")
    model.model.embed_tokens.register_forward_hook(lambda part, _, out: nn.functional.dropout(out, 0.5, part.training))
    return model


def test_what_dropout_has_made_is_read_by_nobody(caplog):
    """It stood for the very text, so that the next prompt read it without a comparison."""
    model, pool = reusing()
    model.model.embed_tokens.register_forward_hook(lambda part, _, out: nn.functional.dropout(out, 0.5, part.training))
    prompt = near(SHARED, 0)
    model.train()
    for _ in range(2):
        cache, result = prefill(pool, model, prompt)
        assert result.computed == len(prompt) and cache.length == 0, "`generate` computes it, as without reuse"
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "model.eval()" in caplog.text
    generate(model, padded(prompt), cache, tokens=2)
    model.eval()
    cache, result = prefill(pool, model, prompt)
    assert result.exact == 0
    expected = next_logits(model, dense(model, prompt[:-1]), prompt)
    torch.testing.assert_close(next_logits(model, cache, prompt), expected, **CLOSE)
    assert prefill(pool, model, prompt)[1].exact > 0


def test_a_model_that_caches_nothing_while_it_trains_answers_as_with_the_stock_cache():
    """With gradient checkpointing the cache is left out; it was said to hold the prompt, all of it as padding."""
    model, pool = reusing()
    prompt = padded(near(SHARED, 0))
    model.gradient_checkpointing_enable()
    model.train()
    cache = JointCache(pool)
    cache.prefill(model, *prompt)
    expected = generate(model, prompt, stock_cache(model), tokens=5)
    assert torch.equal(generate(model, prompt, cache, tokens=5).sequences, expected.sequences)
    assert pool.reuse is not None and not pool.reuse_faults


def test_a_model_that_leaves_the_cache_out_is_refused(monkeypatch):
    model, pool = reusing()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: forward(**{**inputs, "past_key_values": None}))
    cache = JointCache(pool)
    with pytest.raises(UnsupportedUse, match="kept 0 of"):
        cache.prefill(model, *padded(near(SHARED, 0)))
    assert cache.length == 0 and pool.reuse is not None
    pool.check_integrity()


def test_each_part_is_in_its_own_mode_again():
    model = with_dropout().train()
    model.model.layers[1].eval()
    modes = {name: part.training for name, part in model.named_modules()}
    assert in_training(model) is not None
    with evaluating(model):
        assert in_training(model) is None
    rotary_of(model, range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pages = prefill_pages(model, text(2 * BLOCK, 3).tolist(), BLOCK, torch.float32)
    assert {name: part.training for name, part in model.named_modules()} == modes
    again = prefill_pages(model.eval(), text(2 * BLOCK, 3).tolist(), BLOCK)
    assert torch.equal(pages.keys, again.keys) and torch.equal(pages.values, again.values)


@pytest.mark.parametrize("header", [BLOCK, BLOCK + 3], ids=["still", "moved"])
def test_autocast_and_none_read_nothing_of_each_other(header):
    """K and V that are rounded stood for the very text of prompts that are not."""
    model, pool = reusing(moved=True)
    for rounds in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounds):
            kept, result = prefill(pool, model, near(SHARED, 0))
            assert result.exact == result.skipped == 0
            prompt = near(SHARED, 1, header=header)
            assert prefill(pool, model, prompt)[1].skipped > 0, "those alike do"
    assert kept.length
