"""Text that is resident at another position is read with its keys turned, under the same promise as other text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from jointkv.errors import InvalidPolicy, PoolFull, UnsupportedModel
from jointkv.hf.cache import JointCache
from jointkv.hf.moved import MovedBlocks
from jointkv.hf.pool import JointPool
from jointkv.hf.prefill_result import PrefillResult
from jointkv.hf.reuse import ReuseOptions
from jointkv.policy import FusionPolicy
from tests.hf.reusing import ALWAYS, ANYTHING, NEVER, dense, near, reusing, text
from tests.hf.tiny_models import BLOCK, build_model

SHARED = text(10 * BLOCK, 5)


def moving(**options: Any) -> tuple[PreTrainedModel, JointPool]:
    return reusing(moved=True, **options)


def read(model: PreTrainedModel, pool: JointPool, prompt: Tensor, key: str = "") -> tuple[JointCache, PrefillResult]:
    cache = JointCache(pool, isolation_key=key)
    return cache, cache.prefill(model, prompt[None])


@pytest.mark.parametrize("header", [1, 2, 3, 5, 6, 8, 13])
def test_what_stands_elsewhere_is_copied_with_its_keys_turned(header: int) -> None:
    model, pool = moving()
    donor, _ = read(model, pool, near(SHARED, 1))
    cache, done = read(model, pool, near(SHARED, 2, header=header))
    whole = (header + len(SHARED)) // BLOCK - -(-header // BLOCK)
    if header % BLOCK == 0 and header != BLOCK:
        assert done.moved == done.skipped == (whole - 1) * BLOCK  # all but the entry block
    assert done.moved >= (whole - 2) * BLOCK and done.moved % BLOCK == 0
    first = done.rows[0].reused[0] * BLOCK
    shift, end = header - BLOCK, first + done.moved
    for layer, rotary in enumerate(pool.reuse.rotary):
        there, here = donor.batch.read(layer), cache.batch.read(layer)
        assert torch.equal(here[1][:, :, first:end], there[1][:, :, first - shift : end - shift])
        keys = there[0][0, :, first - shift : end - shift].transpose(0, 1)
        turned = rotary.turn(keys, torch.full((len(keys),), shift)).transpose(0, 1)
        torch.testing.assert_close(here[0][0, :, first:end], turned, rtol=1e-5, atol=1e-6)
    assert cache.tables[0].served[0, list(done.rows[0].reused)].all()
    assert set(cache.tables[0].pages[0].tolist()).isdisjoint(donor.tables[0].pages[0].tolist())
    pool.check_integrity()


def test_keys_agree_with_a_prefill_where_nothing_stands_before() -> None:
    model, pool = moving()
    for layer in model.model.layers:  # attention adds nothing: K and V depend on token and position alone
        layer.self_attn.o_proj.weight.data.zero_()
    read_first, _ = read(model, pool, near(SHARED, 1))
    prompt = near(SHARED, 2, header=7)
    cache, done = read(model, pool, prompt)
    assert done.moved >= 7 * BLOCK and read_first.length
    exact = DynamicCache(config=model.config)
    dense(model, prompt[:-1], exact)
    for layer in range(len(exact.layers)):
        for here, true in zip(
            cache.batch.read(layer), (exact.layers[layer].keys, exact.layers[layer].values), strict=True
        ):
            torch.testing.assert_close(here, true, rtol=1e-4, atol=1e-5)


def test_generation_goes_on_and_the_pages_go_back() -> None:
    model, pool = moving()
    donor, _ = read(model, pool, near(SHARED, 1))
    prompt = near(SHARED, 2, header=6)[None]
    cache = JointCache(pool)
    assert cache.prefill(model, prompt).moved
    said = model.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert said.shape[1] == prompt.shape[1] + 6
    pool.check_integrity()
    del cache, donor
    assert pool.blocks.num_used == 0
    pool.check_integrity()


def test_text_in_another_order() -> None:
    model, pool = moving()
    one, two = text(6 * BLOCK, 11), text(6 * BLOCK, 12)
    donor, _ = read(model, pool, torch.cat((text(3, 1), one, two, text(3, 2))))
    _, done = read(model, pool, torch.cat((text(5, 3), two, one, text(3, 4))))
    assert done.rows[0].runs >= 2 and done.moved >= 6 * BLOCK and donor.length


def test_only_text_of_the_same_key() -> None:
    model, pool = moving()
    donor, _ = read(model, pool, near(SHARED, 1), "a")
    assert not read(model, pool, near(SHARED, 2, header=6), "b")[1].moved and donor.length
    assert read(model, pool, near(SHARED, 3, header=6), "a")[1].moved


def test_not_unless_asked_for() -> None:
    model, pool = reusing()
    donor, _ = read(model, pool, near(SHARED, 1))
    assert not read(model, pool, near(SHARED, 2, header=6))[1].skipped and donor.length


def test_an_entry_block_that_is_too_far_stops_it() -> None:
    model, pool = moving(policy=FusionPolicy(max_relative_error=1e-3, max_token_error=1e-3))
    donor, _ = read(model, pool, near(SHARED, 1))
    _, done = read(model, pool, near(SHARED, 2, header=6))
    assert not done.skipped and not done.audits and donor.length


def test_a_licence_of_its_own() -> None:
    model, pool = moving(mode="licensed", audit_rate=NEVER, miss_rate=0.5)
    reuse = pool.reuse
    donor, _ = read(model, pool, near(SHARED, 1))
    seed, audits = 100, 0
    while not reuse.licence("", moved=True).granted:
        seed, audits = seed + 1, audits + 1
        cache, done = read(model, pool, near(SHARED, seed, header=6))
        assert done.audits and done.audited_blocks and not done.skipped and audits < 60
        for page in cache.tables[0].pages[0]:  # or the next ones would stand at its position
            reuse.residents.forget(page[None])
    assert not reuse.licence("").granted
    assert read(model, pool, near(SHARED, 2, header=6))[1].moved
    stats = pool.stats()
    assert (stats["licensed_keys"], stats["licensed_keys_moved"]) == (0, 1) and stats["moved_tokens_skipped"] > 0
    assert donor.length


def test_audits_tell_the_two_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = moving(audit_rate=ALWAYS)
    told: list[tuple[float, bool]] = []
    monkeypatch.setattr(pool.reuse, "observe", lambda tenant, share, moved: told.append((share, moved)))
    other = text(6 * BLOCK, 12)
    donor, _ = read(model, pool, torch.cat((text(BLOCK, 1), SHARED, other, text(3, 2))))
    _, done = read(model, pool, torch.cat((text(BLOCK, 3), SHARED, text(2, 4), other, text(3, 5))))
    assert done.audits and not done.skipped and donor.length
    assert told == [(0.0, False), (0.0, True)]


def test_a_full_pool_is_said_and_nothing_is_lost() -> None:
    model, pool = moving(max_pages=24)
    donor, _ = read(model, pool, near(SHARED, 1))
    cache = JointCache(pool)
    with pytest.raises(PoolFull):
        cache.prefill(model, near(torch.cat((SHARED, text(40, 7))), 2, header=6)[None])
    assert pool.reuse is not None and not cache.length and donor.length
    pool.check_integrity()


def test_a_fault_while_it_is_written_switches_reuse_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = moving()
    donor, _ = read(model, pool, near(SHARED, 1))

    def broken(*args: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(MovedBlocks, "of", broken)
    prompt = near(SHARED, 2, header=6)
    cache, done = read(model, pool, prompt)
    assert pool.reuse is None and done.computed == len(prompt) and cache.length == len(prompt) - 1 and donor.length
    pool.check_integrity()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="not turned"):
        JointPool(build_model("gpt2"), ANYTHING, reuse=ReuseOptions("probed", moved=True))
    with pytest.raises(InvalidPolicy, match="even block size"):
        JointPool(build_model("llama"), ANYTHING, block_size=3, reuse=ReuseOptions("probed", moved=True))


def test_witnesses_elsewhere_make_the_entry_block_unnecessary(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = moving()
    monkeypatch.setattr(pool.reuse, "draws_audit", lambda: True)
    kept = [read(model, pool, near(SHARED, seed, header=BLOCK + seed))[0] for seed in range(3)]
    monkeypatch.undo()
    _, done = read(model, pool, near(SHARED, 9, header=9))
    whole = (9 + len(SHARED)) // BLOCK - 3
    assert done.moved == whole * BLOCK and kept
