"""What inspect says of reuse: bounds from tokens alone, and what `JointCache.prefill` would do with a model."""

import pytest
import torch

from jointkv.evaluate.predict.reuse import by_audits, from_tokens
from jointkv.evaluate.predict.similarity import prefill_rows
from jointkv.hf.cache import JointCache
from jointkv.policy import FusionPolicy
from jointkv.theory.licence import Licence
from tests.hf.reusing import ANYTHING, BY_ENTRY, near, padded, reusing, text
from tests.hf.tiny_models import BLOCK, build_model

SHARED = text(8 * BLOCK, 7)


def test_from_tokens_counts_what_lies_behind_an_entry_block():
    rows = [near(SHARED, seed).tolist() for seed in range(3)]
    found = from_tokens([*rows, rows[0], text(5, 1).tolist()], BLOCK)
    assert (found.requests, found.tokens) == (5, 4 * 39 + 5)
    assert found.exact_tokens == 9 * BLOCK and found.skipped_tokens == 2 * 7 * BLOCK
    assert (found.runs, found.blocks, found.missed_blocks, found.miss_limit) == (2, 14, None, None)
    assert found.share == 2 * 7 * BLOCK / found.tokens
    assert found.moved_tokens == 0
    assert from_tokens([[]], BLOCK).share == 0


def test_from_tokens_counts_what_stands_elsewhere_apart():
    found = from_tokens([near(SHARED, 1).tolist(), near(SHARED, 2, header=BLOCK + 2).tolist()], BLOCK)
    assert found.skipped_tokens == found.exact_tokens == 0
    assert found.moved_tokens == 6 * BLOCK and found.moved_share == found.moved_tokens / found.tokens  # 7 whole blocks
    assert from_tokens([near(SHARED, 1).tolist()] * 2, BLOCK).moved_tokens == 0
    assert from_tokens([near(SHARED, 1).tolist()] * 2, 3).moved_tokens is None


@pytest.mark.parametrize("policy", [ANYTHING, FusionPolicy.preset("safe")], ids=["anything", "safe"])
def test_audits_skip_what_a_cache_would(policy):
    prompts = [near(SHARED, seed) for seed in range(4)]
    model, pool = reusing(policy=policy)
    done = JointCache(pool).prefill(model, *padded(*prompts))
    rows = [prompt.tolist() for prompt in prompts]
    batch = prefill_rows(build_model("llama"), rows, BLOCK, lambda count: None)
    licence = Licence()
    found = by_audits(batch, rows, policy, licence, BY_ENTRY)
    # When all are computed, the entry blocks of the third and the fourth have witnesses, and need not be.
    entries = 2 * BLOCK if done.skipped else 0
    assert found.skipped_tokens == done.skipped + entries and found.tokens == done.tokens
    assert found.missed_blocks == 0 and found.granted is False and licence.audits == (3 if found.runs else 0)
    assert (found.miss_limit == 1) == (found.runs == 0)


def test_blocks_beyond_the_bounds_are_counted():
    """Two contexts are near by luck at the entry block, and far behind it."""
    prompts = [near(SHARED, seed) for seed in range(2)]
    rows = [prompt.tolist() for prompt in prompts]
    batch = prefill_rows(build_model("llama"), rows, BLOCK, lambda count: None)
    first, second = batch.table[:, 1]
    for side in ("key", "value"):
        for layer in range(batch.layers):
            batch.state[f"{side}.{layer}"][second] = batch.state[f"{side}.{layer}"][first]
    found = by_audits(batch, rows, FusionPolicy.preset("safe"), Licence())
    assert (found.blocks, found.runs) == (7, 1) and found.missed_blocks > 0
    assert torch.isfinite(torch.tensor(found.miss_limit))
