"""`JointCache.prefill` reads what is resident, computes what is not, and compares what it may."""

import numpy as np
import pytest
import torch

from jointkv.errors import BadInput, InvalidPolicy, LayoutError, PoolFull, UnsupportedModel
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.hf.residents import Residents
from jointkv.hf.reuse import ReuseOptions
from jointkv.policy import FusionPolicy
from jointkv.policy.reuse import ReuseRule
from tests.hf.reusing import (
    ALWAYS,
    dense,
    near,
    next_logits,
    padded,
    prefill,
    reusing,
    text,
    with_donor,
)
from tests.hf.tiny_models import BLOCK, assert_same_output, build_model, generate, stock_cache

SHARED = text(8 * BLOCK, 7)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MODELS = {
    "llama": ("llama", "sdpa"),
    "llama-eager": ("llama", "eager"),
    "qwen2": ("qwen2", "sdpa"),
    "gemma": ("gemma", "sdpa"),
    "gpt2": ("gpt2", "sdpa"),
    "deepseek": ("deepseek_v3", "sdpa"),
}


def answers(model, pool, *prompts):
    """New tokens, `[rows, 12]`, and what prefill did."""
    cache = JointCache(pool)
    batch = padded(*prompts)
    result = cache.prefill(model, *batch)
    found = generate(model, batch, cache)
    cache.check_integrity()
    return found, result


@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS)
def test_reused_blocks_are_the_donors_and_the_rest_is_computed_behind_them(kind):
    name, attention = kind
    model, pool = reusing(name, attention=attention)
    prompts = [near(SHARED, seed) for seed in range(3)]
    cache, result = prefill(pool, model, *prompts)
    assert [row.reused for row in result.rows] == [(), tuple(range(2, 9)), tuple(range(2, 9))]
    assert [(row.skipped, row.runs, row.gaps) for row in result.rows[1:]] == [(7 * BLOCK, 1, 1)] * 2
    assert result.computed == result.tokens - 14 * BLOCK and result.exact == 0
    donor = dense(model, prompts[0])
    batch = padded(*prompts)
    with torch.no_grad():
        actual = model(input_ids=batch[0][:, -1:], attention_mask=batch[1], past_key_values=cache).logits[:, -1]
    for row, (prompt, done) in enumerate(zip(prompts, result.rows, strict=True)):
        expected = next_logits(model, with_donor(model, prompt, done.reused, donor), prompt)
        torch.testing.assert_close(actual[row], expected, **CLOSE)
    assert torch.equal(cache.tables[0].pages[1, 2:9], cache.tables[0].pages[0, 2:9])
    assert pool.stats()["prompt_tokens_skipped"] == 14 * BLOCK and pool.stats()["reuse_runs"] == 2


def test_without_reuse_nothing_is_done_and_answers_are_bit_equal():
    prompts = padded(near(SHARED, 0), near(SHARED, 1, tail=6))
    stock = build_model("llama")
    expected = generate(stock, prompts, stock_cache(stock))
    for policy, mode in (("off", "off"), ("safe", "off"), (FusionPolicy(max_relative_error=0.0), "probed")):
        model = build_model("llama")
        pool = JointPool(model, policy, block_size=BLOCK, reuse=mode)
        assert pool.reuse is None and pool.stats()["reuse"] == "off"
        cache = JointCache(pool)
        result = cache.prefill(model, *prompts)
        assert (result.computed, result.skipped, cache.length) == (result.tokens, 0, 0)
        if policy != "safe":
            assert_same_output(expected, generate(model, prompts, cache))


def test_rows_of_a_batch_are_what_they_are_alone_and_generation_goes_on():
    prompts = [near(SHARED, 0), near(SHARED, 1, tail=9), near(SHARED, 2, tail=1), text(1, 3), text(6, 4)]
    together, result = answers(*reusing(), *prompts)
    model, pool = reusing()
    kept = []
    for row, prompt in enumerate(prompts):
        cache = JointCache(pool)
        ids, mask = padded(prompt)
        alone = cache.prefill(model, ids, mask)
        kept.append(cache)
        assert alone.rows[0] == result.rows[row]
        found = generate(model, (ids, mask), cache)
        for step, (one, many) in enumerate(zip(found.logits, together.logits, strict=True)):
            torch.testing.assert_close(many[row], one[0], **CLOSE, msg=f"row {row}, step {step}")
    assert [row.skipped for row in result.rows] == [0, 7 * BLOCK, 7 * BLOCK, 0, 0]


def test_an_entry_block_beyond_the_bounds_stops_the_run():
    """A random model's K and V depend on all that comes before, so nothing is reused under the usual bounds."""
    model, pool = reusing(policy=FusionPolicy.preset("safe"))
    prompts = [near(SHARED, seed) for seed in range(3)]
    found, result = answers(model, pool, *prompts)
    assert result.skipped == 0 and result.computed == result.tokens
    expected = generate(build_model("llama"), padded(*prompts), stock_cache(model))
    assert torch.equal(found.sequences, expected.sequences)
    residents = pool.reuse.residents
    known = residents.evidence
    assert known.count.sum() == 0 and known.worst.max() > 1, "none was within the bounds, and some tell"


def test_a_run_is_tried_again_further_on():
    """What differs matters less with distance: here the bounds are exceeded by the first two shared blocks only."""
    model, pool = reusing(rule=ReuseRule(witnesses=99))
    prompts = [near(SHARED, seed) for seed in range(2)]
    within = {3, 4, 5, 6, 7, 8}

    def ratio(self, slots, pages):
        return np.array([0.5 if slot in within else 2.0 for slot in slots.tolist()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jointkv.hf.row_steps.RowSteps.ratios", ratio)
        _, result = prefill(pool, model, *prompts)
    # Slots 1 and 2 are tried, then 4, after which there are 5 to 8.
    assert result.rows[1].reused == (5, 6, 7, 8)


def test_equal_prompts_are_exact_and_no_evidence():
    model, pool = reusing(mode="licensed")
    prompt = near(SHARED, 0)
    cache, result = prefill(pool, model, prompt, prompt)
    assert result.rows[1].exact == 9 * BLOCK and result.skipped == 0 and not result.audits
    assert pool.reuse.residents.evidence.count.sum() == 0
    assert not cache.tables[0].served.any()
    expected = next_logits(model, dense(model, prompt[:-1]), prompt)
    kept = JointCache(pool)
    kept.prefill(model, *padded(prompt))
    torch.testing.assert_close(next_logits(model, kept, prompt), expected, **CLOSE)


def test_a_prompt_that_goes_on_like_an_earlier_one_is_read_exactly_from_its_start():
    model, pool = reusing()
    first, second = near(SHARED, 0), torch.cat((near(SHARED, 0)[:-3], text(2 * BLOCK, 5), text(3, 6)))
    cache, result = prefill(pool, model, first, second)
    assert result.rows[1].exact == 9 * BLOCK and not cache.tables[0].served.any()
    _, third = prefill(pool, model, torch.cat((second[: 11 * BLOCK], text(2 * BLOCK, 8))))
    assert third.exact == 11 * BLOCK, "what was computed behind exact pages is exact"


def test_without_a_licence_all_is_computed_until_audits_have_earned_it():
    model, pool = reusing(mode="licensed", miss_rate=0.2)
    caches, granted = [], None
    for seed in range(40):
        cache, result = prefill(pool, model, near(SHARED, seed))
        caches.append(cache)
        if seed:
            assert (result.skipped > 0) == (granted is not None) == (not result.audits)
            # The first audit makes witnesses; where there are some the entry block may be read as well.
            assert result.audited_blocks == (0 if granted is not None else 7 if seed == 1 else 8)
            assert result.missed_blocks == 0
        if granted is None and pool.reuse.licence("").granted:
            granted = seed
    assert granted is not None and granted >= 13, "ln(1/0.05)/-ln(0.8) audits at the least"
    stats = pool.stats()
    assert stats["reuse_audits"] == granted and stats["licences_granted"] == 1 == stats["licensed_keys"]
    assert stats["reuse_audited_blocks"] == 8 * granted - 1 and stats["reuse_missed_blocks"] == 0


def test_audits_that_miss_take_the_licence_away(monkeypatch):
    model, pool = reusing(mode="licensed", miss_rate=0.2, audit_rate=ALWAYS)
    caches = [prefill(pool, model, near(SHARED, seed))[0] for seed in range(30)]
    assert pool.reuse.licence("").granted

    def ratios(self, slots, pages):
        return np.where(slots > 4, 2.0, 0.5)

    monkeypatch.setattr("jointkv.hf.row_steps.RowSteps.ratios", ratios)
    monkeypatch.setattr(Residents, "witness", lambda *arguments: None)
    for seed in range(100, 160):
        cache, result = prefill(pool, model, near(SHARED, seed))
        caches.append(cache)
        assert (result.audits, result.audited_blocks, result.missed_blocks) == (1, 8, 4)
        if not pool.reuse.licence("").granted:
            break
    assert seed < 130 and pool.stats()["licences_lost"] == 1


def test_an_audit_is_bit_equal_to_a_prompt_that_finds_nothing():
    prompts = [near(SHARED, seed) for seed in range(2)]
    model, pool = reusing(audit_rate=ALWAYS)
    audited, result = prefill(pool, model, *prompts)
    assert result.audits == 1
    other, alone = reusing()
    lonely, _ = prefill(alone, other, prompts[1])
    for mine, theirs in zip(pool.blocks.kv.keys, alone.blocks.kv.keys, strict=True):
        for slot in range(9):
            page, expected = audited.tables[0].pages[1, slot], lonely.tables[0].pages[0, slot]
            assert torch.equal(mine[page], theirs[expected])


def test_isolation_keys_find_nothing_of_each_other():
    model, pool = reusing()
    first, _ = prefill(pool, model, near(SHARED, 0), key="a")
    _, other = prefill(pool, model, near(SHARED, 1), key="b")
    _, mixed = prefill(pool, model, near(SHARED, 2), near(SHARED, 3), key=["c", "a"])
    assert other.skipped == 0 and [row.skipped for row in mixed.rows] == [0, 7 * BLOCK]
    assert first.batch_size == 1


def test_what_is_computed_behind_reused_pages_serves_nobody_unmeasured():
    model, pool = reusing()
    long = torch.cat((SHARED, text(2 * BLOCK, 30), text(5 * BLOCK, 31)))
    cache, result = prefill(pool, model, near(SHARED, 0), near(long, 1), near(long, 2))
    assert [row.skipped // BLOCK for row in result.rows] == [0, 7, 7]
    assert pool.reuse.residents.pages().tolist() == sorted(
        {*cache.tables[0].pages[0, :9].tolist(), *cache.tables[0].pages[1:, :2].flatten().tolist()}
    )


def test_a_full_pool_leaves_the_cache_empty():
    model, pool = reusing(max_pages=14)
    first, _ = prefill(pool, model, near(SHARED, 0))
    cache = JointCache(pool)
    with pytest.raises(PoolFull):
        cache.prefill(model, *padded(near(SHARED, 1), near(text(8 * BLOCK, 8), 2)))
    assert cache.length == 0
    cache.check_integrity()
    _, result = prefill(pool, model, near(SHARED, 1))
    assert result.skipped == 7 * BLOCK, "which takes few pages"
    assert first.length == 38


@pytest.mark.parametrize("method", ["find", "add", "witness"])
def test_a_fault_switches_reuse_off_and_prompts_are_computed(method, monkeypatch, caplog):
    model, pool = reusing(policy=FusionPolicy.preset("safe"))
    prompts = [near(SHARED, seed) for seed in range(3)]
    expected = generate(build_model("llama"), padded(*prompts), stock_cache(model))

    def broken(*arguments):
        raise ValueError("broken")

    monkeypatch.setattr(Residents, method, broken)
    found, result = answers(model, pool, *prompts)
    assert torch.equal(found.sequences, expected.sequences)
    assert result.tokens == result.computed and pool.reuse is None and pool.stats()["reuse"] == "faulted"
    assert caplog.text.count("reuse switched off after an internal fault: ValueError: broken") == 1


def test_an_error_of_the_model_is_the_callers(monkeypatch):
    model, pool = reusing()
    first, _ = prefill(pool, model, near(SHARED, 0))
    monkeypatch.setattr(model.model.layers[1], "forward", lambda *a, **k: 1 / 0)
    cache = JointCache(pool)
    with pytest.raises(ZeroDivisionError):
        cache.prefill(model, *padded(near(SHARED, 1)))
    assert cache.length == 0 and pool.reuse is not None and pool.stats()["reuse"] == "probed"
    first.check_integrity()


def test_what_cannot_be_prefilled_is_refused():
    model, pool = reusing()
    cache, _ = prefill(pool, model, near(SHARED, 0))
    ids, mask = padded(near(SHARED, 1))
    with pytest.raises(BadInput, match="the cache holds 38 tokens already"):
        cache.prefill(model, ids, mask)
    with pytest.raises(LayoutError, match="padded on the left"):
        JointCache(pool).prefill(model, ids, mask.flip(1).index_fill(1, torch.tensor([0]), 1) * (ids > 50))
    with pytest.raises(LayoutError, match="ids and mask"):
        JointCache(pool).prefill(model, ids, mask[:, 1:])
    with pytest.raises(BadInput, match="no token"):
        JointCache(pool).prefill(model, ids, mask * 0)


REFUSED = {
    "policy off": ("off", {}, "needs a policy with error bounds"),
    "paper": ("paper", {}, "needs a policy with error bounds"),
    "chunk": (FusionPolicy(scope="chunk"), {}, "between requests"),
    "groups": (FusionPolicy(layer_groups="per_layer"), {}, "layer_groups=1"),
    "mode": ("safe", {"mode": "always"}, "'always' is none of off, licensed, probed"),
    "miss rate": ("safe", {"miss_rate": 0.0}, "reuse_miss_rate: 0.0 is not between 0 and 1"),
    "confidence": ("safe", {"confidence": 1.0}, "reuse_confidence: 1.0"),
    "audit rate": ("safe", {"audit_rate": float("nan")}, "reuse_audit_rate: nan"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_options_that_make_no_sense_are_refused(case):
    policy, options, message = case
    with pytest.raises(InvalidPolicy, match=message):
        JointPool(build_model("llama"), policy, reuse=ReuseOptions(**options))


def test_a_model_with_layers_outside_the_pages_is_refused():
    with pytest.raises(UnsupportedModel, match="not in pages"):
        JointPool(build_model("gemma3"), reuse="probed")
