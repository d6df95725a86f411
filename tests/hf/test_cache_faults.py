"""A full pool, and faults inside the fusion: the caches stay whole and the answers stay right."""

import copy
import gc
import logging

import pytest
import torch

from jointkv.errors import IntegrityError, PoolFull, UnsupportedUse
from jointkv.fusion.fuser import Fuser
from jointkv.hf.cache import JointCache
from jointkv.hf.step import Step
from jointkv.policy import FusionPolicy
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


@pytest.mark.parametrize("groups", [1, "per_layer"])
def test_a_full_pool_names_what_is_missing_and_changes_nothing(groups):
    policy = FusionPolicy(max_relative_error=0.0, layer_groups=groups)
    per_block = 1 if groups == 1 else 3
    stock = build_model("llama")
    model, pool = joint("llama", policy, max_pages=10 * per_block)
    other, cache, theirs = JointCache(pool), JointCache(pool), stock_cache(stock)
    ids, _ = prompts(26, 26)
    step(model, other, prompts(3 * BLOCK, seed=8)[0])
    step(model, cache, ids[:, :10])
    step(stock, theirs, ids[:, :10])
    assert pool.stats()["pages_used"] == 9 * per_block
    before = [table.pages.clone() for table in cache.tables]
    with pytest.raises(PoolFull, match=f"{8 * per_block} pages requested, {7 * per_block} missing") as caught:
        model(input_ids=ids[:, 10:], past_key_values=cache)
    assert (caught.value.missing, caught.value.total) == (7 * per_block, 10 * per_block)
    del caught
    assert all(torch.equal(old, table.pages) for old, table in zip(before, cache.tables, strict=True))
    assert cache.get_seq_length() == 10 and pool.stats()["pages_used"] == 9 * per_block
    cache.check_integrity()
    del other
    gc.collect()
    more = ids[:, 10:14]
    assert torch.equal(step(stock, theirs, more), step(model, cache, more))
    with pytest.raises(PoolFull):
        model(input_ids=ids[:, :12], past_key_values=cache)
    assert torch.equal(step(stock, theirs, ids[:, 14:16]), step(model, cache, ids[:, 14:16]))
    assert pool.faults == 0


@pytest.mark.parametrize("groups", [1, 3])
def test_a_full_pool_counts_the_copies_that_a_write_needs(groups):
    """Copies of a row share their unfilled block; going on needs a page for every copy."""
    stock = build_model("llama")
    policy = FusionPolicy(max_relative_error=0.0, layer_groups=groups)
    model, pool = joint("llama", policy, max_pages=4 * groups + groups // 2)
    cache, theirs = JointCache(pool), stock_cache(stock)
    ids, _ = prompts(BLOCK + 2)
    step(model, cache, ids)
    step(stock, theirs, ids)
    cache.batch_repeat_interleave(4)
    theirs.batch_repeat_interleave(4)
    tokens = torch.tensor([[5], [6], [7], [8]])
    before = [table.pages.clone() for table in cache.tables]
    with pytest.raises(PoolFull):
        model(input_ids=tokens, past_key_values=cache)
    cache.check_integrity()
    assert all(torch.equal(old, table.pages) for old, table in zip(before, cache.tables, strict=True))
    assert cache.pages == 2 * groups and cache.references == 8 * groups
    for each in (cache, theirs):
        each.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(step(model, cache, tokens[:2]), step(stock, theirs, tokens[:2]))
    assert cache.pages == 3 * groups


def test_an_empty_cache_that_was_refused_pages_takes_another_batch():
    model, pool = joint("llama", "off", max_pages=6)
    cache = JointCache(pool)
    with pytest.raises(PoolFull, match="14 missing"):
        generate(model, prompts(20, 20, 20, 20), cache)
    assert cache.get_seq_length() == 0 and pool.stats()["pages_used"] == 0
    generate(model, prompts(10), cache, tokens=5)
    assert cache.references == 4


def test_a_full_pool_leaves_sliding_layers_as_they_were():
    """They come before the first full layer, so they have seen the tokens by the time that pages are missing."""
    stock = build_model("gemma3")
    model, pool = joint("gemma3", "off", max_pages=7)
    ids, _ = prompts(21)
    other, cache, theirs = JointCache(pool), JointCache(pool), stock_cache(stock)
    step(model, other, ids[:, :7])
    step(model, cache, ids[:, :12])
    step(stock, theirs, ids[:, :12])
    with pytest.raises(PoolFull):
        model(input_ids=ids[:, 12:], past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [12] * 4
    del other
    gc.collect()
    assert torch.equal(step(stock, theirs, ids[:, 12:]), step(model, cache, ids[:, 12:]))


def test_fusion_makes_room_in_a_small_pool():
    """Duplicates that arrive one after the other fit where an unfused pool is full."""
    prompt = prompts(6 * BLOCK)
    for policy, fits in (("off", False), (EXACT, True)):
        model, pool = joint("llama", policy, max_pages=14)
        caches = [JointCache(pool) for _ in range(6)]
        if fits:
            for cache in caches:
                step(model, cache, *prompt)
            assert pool.stats()["pages_used"] == 6 and pool.stats()["pages_peak"] == 12
        else:
            with pytest.raises(PoolFull):
                for cache in caches:
                    step(model, cache, *prompt)


@pytest.mark.parametrize("error", [RuntimeError("broken"), IntegrityError("broken")])
@pytest.mark.parametrize("call", [1, 3])
def test_an_internal_fault_switches_fusion_off(monkeypatch, caplog, call, error):
    """From the first fault on nothing is fused; what is fused already stays valid."""
    stock = build_model("llama")
    model, pool = joint("llama", EXACT)
    original, calls = Fuser.fuse, []

    def fuse(self, *arguments):
        calls.append(arguments)
        if len(calls) >= call:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(Fuser, "fuse", fuse)
    prompt = duplicates(3, 18)
    expected = generate(stock, prompt, stock_cache(stock))
    caches = [JointCache(pool), JointCache(pool)]
    with caplog.at_level(logging.DEBUG, logger="jointkv"):
        for cache in caches:
            assert_same_output(expected, generate(model, prompt, cache))
            cache.check_integrity()
    lines = [record for record in caplog.records if record.name == "jointkv"]
    assert len(lines) == 1 and lines[0].levelno == logging.ERROR
    assert "fusion switched off" in lines[0].message and type(error).__name__ in lines[0].message
    assert len(calls) == call and pool.faults == 1
    assert pool.stats()["fusion"] == "faulted" and pool.stats()["faults"] == 1
    assert caches[1].pages == caches[1].references == 24
    assert (caches[0].pages < 24) == (call > 1)


def test_counters_survive_a_fault(monkeypatch):
    """What was freed before the fault is still freed, and the statistics must go on saying so."""
    model, pool = joint("llama", EXACT)
    cache = JointCache(pool)
    step(model, cache, *duplicates(2, 3 * BLOCK))
    assert pool.stats()["blocks_fused"] == 3

    def fuse(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(Fuser, "fuse", fuse)
    step(model, cache, duplicates(2, BLOCK)[0])
    assert pool.stats()["fusion"] == "faulted"
    assert pool.stats()["blocks_fused"] == pool.stats()["pages_freed"] == 3


def test_a_failed_forward_pass_can_be_repeated(monkeypatch):
    """Out of memory, or an interrupt, in the middle of the layers."""
    stock = build_model("llama")
    model, pool = joint("llama", EXACT)
    prompt = duplicates(2, 14)
    cache, theirs = JointCache(pool), stock_cache(stock)
    step(model, cache, *prompt)
    step(stock, theirs, *prompt)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        model(input_ids=duplicates(2, 3, seed=2)[0], past_key_values=cache)
    hook.remove()
    cache.check_integrity()
    cache.crop(14)
    assert [layer.get_seq_length() for layer in cache.layers] == [14] * 3
    more, _ = prompts(7, 7)
    assert torch.equal(step(stock, theirs, more), step(model, cache, more))


def test_statistics_describe_what_is_held():
    model, pool = joint("llama", EXACT)
    cache = JointCache(pool)
    assert cache.stats() == {"sequences": 0, "tokens": 0, "references": 0, "pages": 0, "bytes": 0, "ratio": 1.0}
    ids, mask = prompts(22, 9)
    generate(model, (ids.repeat(2, 1), mask.repeat(2, 1)), cache, tokens=3)
    page = 3 * 2 * BLOCK * 2 * 8 * 4
    # 24 and 11 tokens per row; 6 + 2 full blocks are shared, the third one of the short rows is not full.
    assert cache.stats() == {
        "sequences": 4,
        "tokens": 70,
        "references": 18,
        "pages": 10,
        "bytes": 10 * page,
        "ratio": 1.8,
    }
    stats = pool.stats()
    assert (stats["pages_used"], stats["references"], stats["bytes_used"]) == (10, 18, 10 * page)
    assert stats["blocks_considered"] == 16 and stats["blocks_fused"] == stats["pages_freed"] == 8
    assert stats["seconds_fusing"] > 0 and stats["fusion"] == "on"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_forward_pass_that_broke_off_between_layers_is_undone(monkeypatch, name):
    """Later layers would have read pages that the broken pass had taken but never written."""
    stock = build_model(name)
    model, pool = joint(name, "safe")
    ids, mask = prompts(18, 18)
    theirs, ours = stock_cache(stock), JointCache(pool)
    for cache, runner in ((theirs, stock), (ours, model)):
        step(runner, cache, ids[:, :10], mask[:, :10])
    write, calls = Step.write, []

    def break_off(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("broken")
        return write(self, *arguments)

    monkeypatch.setattr(Step, "write", break_off)
    with pytest.raises(RuntimeError, match="broken"):
        step(model, ours, ids[:, 10:], mask)
    monkeypatch.setattr(Step, "write", write)
    expected, actual = step(stock, theirs, ids[:, 10:], mask), step(model, ours, ids[:, 10:], mask)
    torch.testing.assert_close(actual, expected)
    ours.check_integrity()


def test_fusion_that_switched_itself_off_lets_go_of_the_pool():
    """Its index kept following freed pages, and an error there would have kept them from the free list."""
    model, pool = joint("llama", "safe")
    cache = JointCache(pool)
    generate(model, duplicates(2, 16), cache)
    broken = pool.fusers["batch"]
    pool.disable_fusion(RuntimeError("broken"))
    assert len(broken.index) == 0
    del cache
    assert pool.stats()["pages_used"] == 0
    pool.check_integrity()


@pytest.mark.parametrize("gone", ["copy", "row"])
def test_a_copy_that_is_gone_takes_no_page_of_a_full_pool(gone):
    """It was still counted as a reader of the unfilled block, and a page asked for to copy that."""
    model, pool = joint("llama", "off", max_pages=3)
    cache = JointCache(pool)
    ids, _ = prompts(2 * BLOCK + 1)
    step(model, cache, ids)
    twin = copy.deepcopy(cache)
    if gone == "row":
        twin.batch_repeat_interleave(2)
    del twin
    with torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert cache.length == 2 * BLOCK + 2 and pool.stats()["pages_used"] == 3
    cache.check_integrity()


def interrupted(model, cache, ids):
    """A forward pass that a KeyboardInterrupt ends in its last layer; torch calls no hook then."""
    interrupt = model.model.layers[-1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    interrupt.remove()


def saved_and_loaded(cache, folder):
    cache.save(folder / "cache")
    return JointCache.load(folder / "cache", cache.pool)


def restored(cache, _):
    again = JointCache(cache.pool)
    state = cache.state()
    again.restore(cache.length, state)
    return again


WHOLE = {
    "crop": lambda cache, _: cache.crop(-1),
    "crop_to": lambda cache, _: cache.crop(BLOCK + 1),
    "reorder": lambda cache, _: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache, _: cache.batch_repeat_interleave(2),
    "copy": lambda cache, _: copy.deepcopy(cache),
    "save": saved_and_loaded,
    "state": restored,
}


@pytest.mark.parametrize("operation", WHOLE)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_after_an_interrupt_a_cache_is_what_it_was_before_the_forward_pass(name, operation, tmp_path):
    """What layers had not written yet was cropped, copied and saved as if they had."""
    (model, pool), (ids, _) = joint(name, "off"), prompts(BLOCK + 6, BLOCK + 6)
    caches = []
    for interrupts in (False, True):
        cache = JointCache(pool)
        step(model, cache, ids[:, : BLOCK + 3])
        if interrupts:
            interrupted(model, cache, ids[:, BLOCK + 3 :])
        caches.append(WHOLE[operation](cache, tmp_path) or cache)
        caches[-1].check_integrity()
    assert caches[0].length == caches[1].length == caches[1].get_seq_length()
    more = prompts(*[3] * caches[0].batch_size, seed=5)[0]
    assert torch.equal(*(step(model, cache, more) for cache in caches))


def test_an_interrupted_prompt_is_prefilled_anew():
    model, pool = joint("llama", "off")
    cache, (ids, mask) = JointCache(pool), prompts(9)
    interrupted(model, cache, ids)
    assert cache.prefill(model, ids, mask).tokens == 9 and not cache.length


@pytest.mark.parametrize("before", [0, 2 * BLOCK])
def test_tokens_that_an_interrupt_has_cost_are_asked_for_and_not_left_out(before):
    """`generate` asks the first layer how many tokens are there, and went on behind those."""
    model, pool = joint("llama", "off")
    cache, (ids, mask) = JointCache(pool), prompts(4 * BLOCK - 1)
    if before:
        step(model, cache, ids[:, :before])
    interrupted(model, cache, ids[:, before : 3 * BLOCK])
    with pytest.raises(UnsupportedUse, match=f"holds {before} tokens again"):
        generate(model, (ids, mask), cache, tokens=3)
    expected = generate(model, (ids, mask), stock_cache(model), tokens=3)
    torch.testing.assert_close(generate(model, (ids, mask), cache, tokens=3).logits, expected.logits)
