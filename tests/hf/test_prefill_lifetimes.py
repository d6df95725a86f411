"""Caches that others' prompts are read from go, and are written again, at any moment."""

import pytest
import torch

from jointkv.hf.cache import JointCache
from jointkv.hf.row_steps import Forward
from tests.hf.reusing import dense, near, next_logits, padded, prefill, reusing, text
from tests.hf.tiny_models import BLOCK

SHARED = text(8 * BLOCK, 7)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def test_pages_of_a_dropped_cache_are_forgotten_and_those_still_read_stay():
    model, pool = reusing()
    first, _ = prefill(pool, model, near(SHARED, 0))
    second, _ = prefill(pool, model, near(SHARED, 1))
    del first
    pool.blocks.collect_dropped()
    pool.check_integrity()
    assert len(pool.reuse.residents) == 9, "7 of the first, which the second reads, and header and entry of the second"
    _, result = prefill(pool, model, near(SHARED, 2))
    assert result.skipped == 6 * BLOCK, "the first shared block that is resident in one request is the entry block"
    del second
    pool.check_integrity()


def test_a_page_that_is_written_again_is_forgotten():
    model, pool = reusing()
    cache, _ = prefill(pool, model, near(SHARED, 0))
    cache.crop(5 * BLOCK + 1)
    with torch.no_grad():
        model(input_ids=text(2 * BLOCK, 3)[None], past_key_values=cache)
    cache.check_integrity()
    _, result = prefill(pool, model, near(SHARED, 1))
    assert result.rows[0].reused == (2, 3, 4)


@pytest.mark.parametrize("header", [BLOCK, BLOCK + 3], ids=["still", "moved"])
def test_what_was_dropped_a_moment_ago_is_not_read(header):
    """A dropped cache's pages are freed by the next call; this one takes them for itself."""
    model, pool = reusing(moved=True)
    first, _ = prefill(pool, model, near(SHARED, 0))
    del first
    prompt = near(SHARED, 1, header=header)
    cache = JointCache(pool)
    result = cache.prefill(model, *padded(prompt))
    assert result.skipped == 0
    torch.testing.assert_close(
        next_logits(model, cache, prompt), next_logits(model, dense(model, prompt[:-1]), prompt), **CLOSE
    )


@pytest.mark.parametrize("header", [BLOCK, BLOCK + 3], ids=["still", "moved"])
def test_a_cache_may_be_dropped_while_another_reads_its_pages(header, monkeypatch):
    """Destructors run at any time: here before every forward pass of the prompt."""
    model, pool = reusing(moved=True)
    prompts = near(SHARED, 0), near(SHARED, 1, header=header)
    kept, _ = prefill(pool, model, prompts[0])
    cache, result = prefill(pool, model, prompts[1])
    assert result.skipped >= 6 * BLOCK
    expected = next_logits(model, cache, prompts[1])
    del cache
    pool.check_integrity()

    held, compute = [kept], Forward.__call__
    del kept

    def dropping(self, **inputs):
        held.clear()
        compute(self, **inputs)

    monkeypatch.setattr(Forward, "__call__", dropping)
    cache = JointCache(pool)
    again = cache.prefill(model, *padded(prompts[1]))
    assert not held and again.rows == result.rows
    torch.testing.assert_close(next_logits(model, cache, prompts[1]), expected)
    pool.check_integrity()
