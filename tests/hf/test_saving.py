"""A saved cache reads back bit for bit, fuses into what is resident, and is refused by name where it does not fit."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jointkv.errors import BadInput, ModelMismatch, PoolFull
from jointkv.hf import JointCache, JointPool
from jointkv.hf.saving import FORMAT, KEYS
from jointkv.policy import FusionPolicy
from tests.hf.tiny_models import duplicates, feed, generate, joint, prompts, step

DIRECTION = FusionPolicy.preset("paper", key_threshold=0.2, skip_first_layers=1, skip_last_layers=0)
PROMPT = prompts(21, 9, 14)


def filled(name="llama", policy="safe", prompt=PROMPT, isolation_key=""):
    model, pool = joint(name, policy)
    cache = JointCache(pool, isolation_key)
    generate(model, prompt, cache)
    return model, pool, cache


def rewrite(folder, change):
    """The saved cache as `bad`, after `change(tensors, metadata)`."""
    with safe_open(folder / "cache", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "cache")
    change(tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "bad", metadata=metadata)


def next_logits(model, cache, mask):
    ids = torch.full((len(mask), 1), 5)
    longer = torch.nn.functional.pad(mask, (0, cache.length + 1 - mask.shape[1]), value=1)
    return step(model, cache, ids, longer)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", ["off", "safe", "direction"])
def test_a_loaded_cache_goes_on_like_the_saved_one(tmp_path, name, policy):
    chosen = FusionPolicy.preset("paper", key_threshold=0.2, skip_first_layers=0, skip_last_layers=0)
    model, pool, cache = filled(name, chosen if policy == "direction" else policy)
    cache.save(tmp_path / "cache")
    loaded = JointCache.load(tmp_path / "cache", JointPool(model, pool.policy, block_size=pool.block_size))
    assert loaded.references == cache.references and loaded.get_seq_length() == cache.get_seq_length()
    assert torch.equal(next_logits(model, loaded, PROMPT[1]), next_logits(model, cache, PROMPT[1]))


def test_distinct_pages_are_written_once(tmp_path):
    _, _, cache = filled(prompt=duplicates(4, 16))
    assert cache.pages < cache.references
    cache.save(tmp_path / "cache")
    assert len(load_file(tmp_path / "cache")["key.0"]) == cache.pages


def test_a_loaded_cache_fuses_into_what_is_resident_of_its_own_tenant(tmp_path):
    _, pool, cache = filled(isolation_key="a")
    cache.save(tmp_path / "cache")
    alone = pool.stats()["pages_used"]
    full_blocks = int((cache.length - cache.padding).div(pool.block_size, rounding_mode="floor").sum())
    again = JointCache.load(tmp_path / "cache", pool, "a")
    assert pool.stats()["pages_used"] == 2 * alone - full_blocks
    other = JointCache.load(tmp_path / "cache", pool, "b")
    assert pool.stats()["pages_used"] == 3 * alone - full_blocks
    for held in (cache, again, other):
        held.check_integrity()


def test_a_full_pool_leaves_nothing_behind(tmp_path):
    model, pool, cache = filled()
    cache.save(tmp_path / "cache")
    small = JointPool(model, "safe", block_size=pool.block_size, max_pages=cache.pages - 1)
    with pytest.raises(PoolFull, match="1 missing"):
        JointCache.load(tmp_path / "cache", small)
    small.check_integrity()
    assert small.stats()["pages_used"] == 0


def test_what_belongs_to_another_model_or_layout_is_refused(tmp_path):
    model, pool, cache = filled()
    cache.save(tmp_path / "cache")
    with pytest.raises(ModelMismatch, match="block_size"):
        JointCache.load(tmp_path / "cache", JointPool(model, "safe", block_size=pool.block_size * 2))
    with pytest.raises(ModelMismatch, match="layer"):
        JointCache.load(tmp_path / "cache", JointPool(model, DIRECTION, block_size=pool.block_size))
    with pytest.raises(ModelMismatch, match="model"):
        JointCache.load(tmp_path / "cache", joint("llama", seed=1)[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("padding"),
        lambda tensors: tensors.pop("value.2"),
        lambda tensors: tensors["table.0"].fill_(10**6),
        lambda tensors: tensors["table.0"].fill_(-1),
        lambda tensors: tensors.update({"table.0": tensors["table.0"].float()}),
        lambda tensors: tensors.update({"fusable": tensors["fusable"][:1]}),
        lambda tensors: tensors["padding"].fill_(-3),
        lambda tensors: tensors.update({"k_scale.0": torch.ones(1)}),
        lambda tensors: tensors.update({"key.1": tensors["key.1"][:, :, :, :1]}),
    ],
)
def test_a_damaged_file_is_bad_input(tmp_path, change):
    _, pool, cache = filled()
    cache.save(tmp_path / "cache")
    rewrite(tmp_path, lambda tensors, _: change(tensors))
    used = pool.stats()["pages_used"]
    with pytest.raises(BadInput, match="damaged"):
        JointCache.load(tmp_path / "bad", pool)
    assert pool.stats()["pages_used"] == used
    pool.check_integrity()


def test_files_that_are_no_saved_cache(tmp_path):
    _, pool, _ = filled()
    (tmp_path / "text").write_text("hello")
    save_file({"a": torch.zeros(1)}, tmp_path / "other", metadata={"format": FORMAT + "0"})
    for name in ("text", "other", "missing"):
        with pytest.raises(BadInput, match=name):
            JointCache.load(tmp_path / name, pool)
    with pytest.raises(BadInput, match="empty"):
        JointCache(pool).save(tmp_path / "cache")


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


ORDERS = [
    ["saved", "file", "keyless"],
    ["file", "keyless", "saved"],
    ["keyless", "file", "saved"],
    ["keyless", "saved"],
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("key", ["tenant-a", ("tenant-a", 3), None, 7], ids=str)
def test_a_loaded_cache_shares_with_the_tenant_it_was_saved_by_alone(tmp_path, key, order):
    model, pool, cache = filled(isolation_key=key, prompt=duplicates(1, 16))
    cache.save(tmp_path / "cache")
    del cache
    held = {}
    for who in order:
        if who == "file":
            held[who] = JointCache.load(tmp_path / "cache", pool)
        else:
            held[who] = JointCache(pool, key if who == "saved" else "")
            generate(model, duplicates(1, 16), held[who])
    pages = {who: set(cache.tables[0].held().tolist()) for who, cache in held.items()}
    assert not pages["keyless"] & set.union(*(read for who, read in pages.items() if who != "keyless"))
    assert "file" not in pages or len(pages["file"] & pages["saved"]) == 6


def test_each_row_has_its_own_tenant_after_loading(tmp_path):
    _, pool, cache = filled(isolation_key=["a", "b", "a"], prompt=duplicates(3, 16))
    cache.batch_select_indices(torch.tensor([1, 2]))
    cache.save(tmp_path / "cache")
    loaded = JointCache.load(tmp_path / "cache", pool)
    assert loaded.isolation_key == ["b", "a"] == loaded.batch.tenants
    other = JointCache.load(tmp_path / "cache", pool, ["c", "a"])
    assert other.batch.tenants == ["c", "a"]


def test_a_loaded_cache_that_is_reset_keeps_its_tenant(tmp_path):
    model, pool, cache = filled(isolation_key="a", prompt=duplicates(2, 16))
    cache.save(tmp_path / "cache")
    loaded = JointCache.load(tmp_path / "cache", pool)
    loaded.reset()
    generate(model, duplicates(3, 16), loaded)
    assert loaded.batch.tenants == ["a"] * 3


def test_a_file_without_a_key_asks_for_one(tmp_path):
    _, pool, cache = filled(isolation_key="a")
    cache.save(tmp_path / "cache")
    rewrite(tmp_path, lambda _, metadata: metadata.pop(KEYS))
    with pytest.raises(BadInput, match="isolation_key="):
        JointCache.load(tmp_path / "bad", pool)
    assert JointCache.load(tmp_path / "bad", pool, "a").batch.tenants == ["a"] * 3


def test_keys_that_a_file_cannot_hold_are_refused(tmp_path):
    _, _, cache = filled(isolation_key=frozenset("a"))
    with pytest.raises(BadInput, match=r"str\(key\)"):
        cache.save(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("keys", ["", "{}", "[]", '["a"]', "[1.5, 1.5, 1.5]", '[{"a": 1}, "a", "a"]', "[" * 9999])
def test_damaged_keys_are_bad_input(tmp_path, keys):
    _, pool, cache = filled()
    cache.save(tmp_path / "cache")
    rewrite(tmp_path, lambda _, metadata: metadata.update({KEYS: keys}))
    with pytest.raises(BadInput, match="damaged"):
        JointCache.load(tmp_path / "bad", pool)


def test_a_state_stays_what_it_was_while_the_cache_goes_on():
    """Its scales were the cache's own: those of a block that filled later, where the state holds what was before."""
    model, pool = joint("llama", FusionPolicy(representative="direction", key_threshold=0.9, value_threshold=0.8))
    cache = JointCache(pool)
    ids, _ = duplicates(2, 3 * pool.block_size)
    step(model, cache, ids[:, :-1])
    state = cache.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    assert any(name.startswith("k_scale") for name in state)
    step(model, cache, ids[:, -1:])
    assert cache.tables[0].scaled(torch.tensor([0, 1]), torch.tensor([2, 2])).any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
