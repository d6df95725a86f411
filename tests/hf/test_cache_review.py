"""Faults that a review found, each with its story in one line."""

import pytest
import torch

from jointkv.hf import JointCache, JointPool
from jointkv.policy import FusionPolicy
from tests.hf.tiny_models import build_model, duplicates, feed, generate, joint, prompts, step, stock_cache


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_forward_pass_that_broke_off_between_layers_is_undone(monkeypatch, name):
    """Later layers would have read pages that the broken pass had taken but never written."""
    stock = build_model(name)
    model, pool = joint(name, "safe")
    ids, mask = prompts(18, 18)
    theirs, ours = stock_cache(stock), JointCache(pool)
    for cache, runner in ((theirs, stock), (ours, model)):
        step(runner, cache, ids[:, :10], mask[:, :10])
    write, calls = JointCache.write_layer, []

    def break_off(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("broken")
        return write(self, *arguments)

    monkeypatch.setattr(JointCache, "write_layer", break_off)
    with pytest.raises(RuntimeError, match="broken"):
        step(model, ours, ids[:, 10:], mask)
    monkeypatch.setattr(JointCache, "write_layer", write)
    expected, actual = step(stock, theirs, ids[:, 10:], mask), step(model, ours, ids[:, 10:], mask)
    torch.testing.assert_close(actual, expected)
    ours.check_integrity()


def test_a_tuple_is_one_isolation_key():
    """Two tuples were read as one key per row, and their second halves met."""
    model, pool = joint("llama", "safe")
    caches = [JointCache(pool, ("organisation", name)) for name in ("alice", "bob")]
    for cache in caches:
        generate(model, duplicates(2, 16), cache)
    held = [set(table.held().tolist()) for cache in caches for table in cache.tables]
    assert not held[0] & held[1]
    assert all(cache.pages < cache.references for cache in caches)


def test_a_served_block_is_not_fused_again_after_loading(tmp_path):
    """Its error against what it once was would have been the sum of two."""
    model, pool = joint("llama", FusionPolicy.preset("safe", max_token_error=None))
    size, layers = pool.block_size, 3
    torch.manual_seed(0)
    base = torch.randn(2, layers, 1, 2, size, 8)
    noise = torch.randn_like(base)
    near, far = base + 0.13 * noise, base - 0.03 * noise
    caches = [JointCache(pool), JointCache(pool)]
    feed(caches[0], *base)
    feed(caches[1], *near)
    assert caches[1].tables[0].served.all()
    caches[1].save(tmp_path / "cache")
    other = JointPool(model, pool.policy, block_size=size)
    resident = JointCache(other)
    feed(resident, *far)
    loaded = JointCache.load(tmp_path / "cache", other)
    assert other.stats()["pages_used"] == 2 and loaded.tables[0].served.all()
    loaded.check_integrity()


def test_saved_text_does_not_disturb_a_pool_that_ignores_it(tmp_path):
    """Token ids were restored where nobody keeps them up to date, and the next block's hash ran off their end."""
    model, pool = joint("llama", FusionPolicy.preset("safe", candidates="tokens"))
    cache = JointCache(pool)
    generate(model, prompts(12, 12), cache)
    cache.save(tmp_path / "cache")
    other = JointPool(model, "safe", block_size=pool.block_size)
    loaded = JointCache.load(tmp_path / "cache", other)
    for _ in range(2 * pool.block_size):
        step(model, loaded, torch.full((2, 1), 3))
    assert other.faults == 0 and other.stats()["fusion"] == "on"


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


def test_another_rotary_base_is_another_model():
    """Shape and weights agree, positions do not."""
    assert joint("llama")[1].fingerprint == joint("llama")[1].fingerprint
    changed = build_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert JointPool(changed).fingerprint != joint("llama")[1].fingerprint
