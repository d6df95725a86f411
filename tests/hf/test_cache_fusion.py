"""What is fused, what never is, and how far the K and V read back may be from the unfused ones."""

import gc

import pytest
import torch

from jointkv.errors import LayoutError
from jointkv.hf.cache import JointCache
from jointkv.policy import FusionPolicy
from tests.hf.tiny_models import (
    BLOCK,
    EXACT,
    assert_same_output,
    block_errors,
    build_model,
    duplicates,
    feed,
    generate,
    joint,
    prompts,
    read_block,
    step,
    stock_cache,
)


def near_prefixes(rows=6, length=30, header=3):
    """One text behind a random header of its own per row, and one exact copy of the first row."""
    ids, mask = duplicates(rows, length)
    ids[:, :header] = prompts(*[header] * rows, seed=9)[0]
    ids[-1] = ids[0]
    return ids, mask


def unfused(model, prompt):
    """K and V `[layers, rows, h, n, d]` of a stock cache after the prompt."""
    cache = stock_cache(model)
    step(model, cache, *prompt, position_ids=(prompt[1].cumsum(1) - 1).clamp(min=0))
    return torch.stack([layer.keys for layer in cache.layers]), torch.stack([layer.values for layer in cache.layers])


def row_pages(cache):
    """The pages that each row reads in the first layer group."""
    return [set(pages[pages >= 0].tolist()) for pages in cache.tables[0].pages]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("aggregate", ["rms", "max"])
@pytest.mark.parametrize("groups", [1, "per_layer"])
def test_every_block_read_back_is_within_the_bound(groups, aggregate, dtype):
    policy = FusionPolicy(max_relative_error=0.2, layer_groups=groups, across_layers=aggregate)
    model, pool = joint("llama", policy, dtype=dtype, initializer_range=0.03)
    ids, mask = near_prefixes()
    ids[2], mask[2] = prompts(17, width=30)[0][0], prompts(17, width=30)[1][0]
    keys, values = unfused(model, (ids, mask))
    cache = JointCache(pool)
    step(model, cache, ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert pool.stats()["pages_freed"] == cache.references - cache.pages > 0
    lossy = 0
    layers = pool.groups.layers
    for row in range(len(ids)):
        for slot in range((30 - int(cache.padding[row])) // BLOCK):
            for errors in block_errors(cache, keys, values, row, slot):
                by_group = errors.view(-1, layers)
                worst = by_group.square().mean(1).sqrt() if aggregate == "rms" else by_group.amax(1)
                assert (worst <= 0.2 + 1e-6).all()
                lossy += int((worst > 0).any())
    assert lossy > 0
    generate(model, (ids, mask), JointCache(pool))
    pool.check_integrity()


def test_what_is_fused_is_stable_while_others_come_and_go():
    """A representative is read by others: neither its owner's leaving nor new requests change their answers."""
    model, pool = joint("llama", FusionPolicy(max_relative_error=0.2), initializer_range=0.06)
    ids, mask = near_prefixes()
    first, second = JointCache(pool), JointCache(pool)
    step(model, first, ids[:1], mask[:1])
    step(model, second, ids[1:], mask[1:])
    before = [read_block(second, layer, row, slot) for layer in range(3) for row in range(5) for slot in range(7)]
    del first
    gc.collect()
    for seed in range(3):
        generate(model, prompts(20, 30, seed=seed), JointCache(pool))
    pool.check_integrity()
    after = [read_block(second, layer, row, slot) for layer in range(3) for row in range(5) for slot in range(7)]
    assert all(torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("policy", [EXACT, FusionPolicy(max_relative_error=0.2), FusionPolicy(candidates="tokens")])
def test_the_same_prompt_again_adds_the_unfilled_block_only(policy):
    model, pool = joint("llama", policy)
    prompt = prompts(10 * BLOCK + 1)
    first, second = JointCache(pool), JointCache(pool)
    step(model, first, *prompt)
    used = pool.stats()["pages_used"]
    step(model, second, *prompt)
    assert used == 11 and pool.stats()["pages_used"] == 12
    assert second.references == second.pages == 11
    del first
    assert pool.stats()["pages_used"] == 11
    del second
    assert pool.stats()["pages_used"] == 0


def test_dropping_a_cache_frees_its_unshared_pages_only():
    stock = build_model("llama")
    model, pool = joint("llama", EXACT)
    ids, mask = duplicates(4, 26)
    ids[1:3, 8:] = prompts(18, 18, seed=4)[0]
    caches = [JointCache(pool) for _ in range(2)]
    expected = stock_cache(stock)
    generate(model, (ids[:2], mask[:2]), caches[0])
    text = generate(stock, (ids[2:], mask[2:]), expected).sequences
    assert torch.equal(generate(model, (ids[2:], mask[2:]), caches[1]).sequences, text)
    held = [set(torch.cat([table.held() for table in cache.tables]).tolist()) for cache in caches]
    unshared = len(held[0] - held[1])
    assert 0 < unshared < len(held[0])
    used = pool.stats()["pages_used"]
    caches.pop(0)
    assert pool.stats()["pages_used"] == used - unshared
    pool.check_integrity()
    text = torch.cat((text, text[:, :5]), 1)
    prompt = text, torch.ones_like(text)
    assert_same_output(generate(stock, prompt, expected), generate(model, prompt, caches[0]))
    caches.clear()
    assert pool.stats()["pages_used"] == pool.stats()["references"] == 0


def test_generated_blocks_are_fused_as_they_fill():
    model, pool = joint("llama", FusionPolicy(max_relative_error=0.05))
    cache = JointCache(pool)
    ids, _ = duplicates(4, 2 * BLOCK)
    token = step(model, cache, ids)[:, -1:].argmax(-1)
    for position in range(2 * BLOCK, 7 * BLOCK):
        full, begun = divmod(position, BLOCK)
        assert cache.pages == full + (4 if begun else 0)
        token = step(model, cache, token)[:, -1:].argmax(-1)
    assert cache.references == 4 * cache.pages == 28
    assert pool.stats()["blocks_fused"] == 21


def test_isolation_keys_are_never_mixed():
    model, pool = joint("llama", FusionPolicy(max_relative_error=0.5, candidates="both"))
    prompt = duplicates(2, 20)
    caches = [JointCache(pool, key) for key in ("a", "b", "a", 3)]
    for cache in caches:
        step(model, cache, *prompt)
        rows = row_pages(cache)
        assert rows[0] == rows[1]
    pages = [row_pages(cache)[0] for cache in caches]
    assert pages[0] == pages[2]
    assert not pages[0] & pages[1] and not pages[0] & pages[3] and not pages[1] & pages[3]


def test_rows_may_have_their_own_isolation_keys():
    model, pool = joint("llama", FusionPolicy(max_relative_error=0.5))
    cache = JointCache(pool, ["a", "b", "a", "c"])
    step(model, cache, *duplicates(4, 20))
    rows = row_pages(cache)
    assert rows[0] == rows[2]
    assert not rows[0] & rows[1] and not rows[0] & rows[3] and not rows[1] & rows[3]
    # The keys follow the rows.
    cache.batch_select_indices(torch.tensor([1, 0]))
    step(model, cache, duplicates(2, 8, seed=3)[0])
    rows = row_pages(cache)
    assert not rows[0] & rows[1]
    other = JointCache(pool, "b")
    step(model, other, *duplicates(1, 20))
    assert row_pages(other)[0] <= rows[0]


def test_keys_of_rows_are_those_of_the_user_after_a_reset():
    _, pool = joint("llama", "safe")
    cache = JointCache(pool, ["a", "b"])
    states = torch.randn(2, 3, 2, 2, 5, 8)
    feed(cache, *states)
    cache.batch_select_indices(torch.tensor([1, 1]))
    assert cache.batch.tenants == ["b", "b"]
    cache.reset()
    feed(cache, *states)
    assert cache.batch.tenants == ["a", "b"]


def test_a_wrong_number_of_isolation_keys_is_refused():
    model, pool = joint("llama", "safe")
    cache = JointCache(pool, ["a", "b"])
    with pytest.raises(LayoutError, match="2 isolation keys for 3"):
        step(model, cache, *duplicates(3, 9))
    assert cache.references == 0 and pool.stats()["pages_used"] == 0
    step(model, cache, *duplicates(2, 9))
    assert cache.references == 6


def test_padding_is_neither_stored_nor_fused():
    """A text behind padding reads the same pages as the text alone, whatever the padding."""
    model, pool = joint("llama", FusionPolicy(max_relative_error=0.05))
    text, _ = prompts(18)
    ids, mask = torch.zeros(4, 31, dtype=torch.long), torch.zeros(4, 31, dtype=torch.long)
    for row, length in enumerate((18, 18, 5, 31)):
        ids[row, -length:], mask[row, -length:] = prompts(length, seed=row)[0][0], 1
    ids[:2, -18:] = text
    cache, alone = JointCache(pool), JointCache(pool)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    step(model, cache, ids, mask, position_ids=positions)
    assert cache.padding.tolist() == [13, 13, 26, 0]
    assert cache.tables[0].num_blocks().tolist() == [5, 5, 2, 8]
    step(model, alone, text)
    rows = row_pages(cache)
    assert len(rows[0] & rows[1]) == len(rows[0] & row_pages(alone)[0]) == 4
    keys, values = unfused(model, (ids, mask))
    for row, blocks in enumerate((4, 4, 1, 7)):
        for slot in range(blocks):
            assert max(part.max() for part in block_errors(cache, keys, values, row, slot)) <= 0.1


@pytest.mark.parametrize("side", ["hole", "right"])
def test_rows_with_masked_tokens_inside_are_never_fused(side):
    stock = build_model("llama")
    model, pool = joint("llama", FusionPolicy(max_relative_error=0.0, candidates="both"))
    ids, mask = duplicates(4, 22)
    mask[:2, slice(9, 12) if side == "hole" else slice(17, 22)] = 0
    theirs, ours = stock_cache(stock), JointCache(pool)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = step(stock, theirs, ids, mask, position_ids=positions)
    actual = step(model, ours, ids, mask, position_ids=positions)
    assert torch.equal(expected, actual)
    rows = row_pages(ours)
    assert not rows[0] & rows[1] and not rows[0] & rows[2]
    assert len(rows[2] & rows[3]) == 5
    for seed in range(3):
        more, _ = prompts(5, 5, 5, 5, seed=seed)
        mask = torch.nn.functional.pad(mask, (0, 5), value=1)
        assert torch.equal(step(stock, theirs, more, mask), step(model, ours, more, mask))
    rows = row_pages(ours)
    assert not rows[0] & rows[1]


def test_one_changed_token_keeps_its_block_apart():
    """Within the bound as a whole, yet one token would be read as another."""
    for token_bound, pages in ((0.3, 2 * 2 - 1), (None, 2)):
        _, pool = joint("llama", FusionPolicy(max_relative_error=0.6, max_token_error=token_bound), block_size=16)
        states = torch.randn(2, 3, 1, 2, 32, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2, 1, 1, 1)
        states[:, :, 1, :, 20] *= -1
        cache = JointCache(pool)
        feed(cache, *states)
        assert cache.pages == pages and cache.references == 4
        error = max(part.max() for part in block_errors(cache, *states, 1, 1))
        assert (error > 0.3) == (token_bound is None)
