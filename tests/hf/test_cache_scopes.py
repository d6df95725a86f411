"""Chunk scope, shared directions and blocks that are no numbers, on synthetic K and V; directions also in a model."""

import pytest
import torch

from jointkv.hf.cache import JointCache
from jointkv.policy import FusionPolicy
from tests.hf.tiny_models import (
    BLOCK,
    EXACT,
    block_errors,
    duplicates,
    feed,
    generate,
    joint,
    prompts,
    read_block,
    stock_cache,
)

CHUNK = 2 * BLOCK
HEADS, SIZE = 2, 8
PAPER = {"skip_first_layers": 0, "skip_last_layers": 0}


def states(rows, tokens, seed=0, layers=3, dtype=torch.float32):
    """Synthetic K and V `[layers, rows, h, n, d]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, layers, rows, HEADS, tokens, SIZE, generator=generator).to(dtype)


def repeated_chunks(rows, chunks, seed=0):
    return states(rows, CHUNK, seed).repeat(1, 1, 1, 1, chunks, 1)


def chunk_pool(scope="chunk", **changes):
    policy = FusionPolicy(scope=scope, chunk_tokens=CHUNK, max_relative_error=0.0, **changes)
    return joint("llama", policy)[1]


@pytest.mark.parametrize("sizes", [[4 * CHUNK], [CHUNK, 3 * CHUNK], [3, 7, 1, 4 * CHUNK - 11], [1] * 4 * CHUNK])
def test_chunks_of_one_request_share_their_blocks(sizes):
    """Whether the chunks arrive in one forward pass or token by token."""
    pool = chunk_pool()
    cache = JointCache(pool)
    keys, values = repeated_chunks(1, 4)
    start = 0
    for size in sizes:
        feed(cache, keys[..., start : start + size, :], values[..., start : start + size, :])
        start += size
    assert cache.references == 8 and cache.pages == 2
    for slot in range(8):
        errors = block_errors(cache, keys, values, 0, slot)
        assert torch.cat(errors).max() == 0
    assert pool.faults == 0


def test_chunk_scope_stays_inside_one_request():
    pool = chunk_pool()
    first, second = JointCache(pool), JointCache(pool)
    same = repeated_chunks(1, 3).repeat(1, 1, 2, 1, 1, 1)
    feed(first, *same)
    feed(second, *same)
    assert first.pages == second.pages == 4 and pool.stats()["pages_used"] == 8
    rows = [set(pages.tolist()) for cache in (first, second) for pages in cache.tables[0].pages]
    assert sum(len(row) for row in rows) == len(set().union(*rows)) == 8


def test_chunk_scope_compares_equal_places_of_chunks_only():
    pool = chunk_pool()
    cache = JointCache(pool)
    block = states(1, BLOCK)
    other = states(1, BLOCK, seed=1)
    feed(cache, *torch.cat((block, other, other, block), 4))
    assert cache.pages == 4
    feed(cache, *torch.cat((block, other), 4))
    assert cache.pages == 4 and cache.references == 6


def test_chunk_scope_starts_where_the_padding_ends():
    pool = chunk_pool()
    cache = JointCache(pool)
    both = repeated_chunks(2, 3)
    padding = torch.tensor([0, 3])
    padded = torch.zeros(2, 3, 2, HEADS, 3 * CHUNK + 3, SIZE)
    padded[:, :, 0, :, : 3 * CHUNK], padded[:, :, 1, :, 3:] = both[:, :, 0], both[:, :, 1]
    mask = (torch.arange(3 * CHUNK + 3) >= padding[:, None]).long()
    cache.begin_step(mask, None)
    feed(cache, *padded)
    assert cache.padding.tolist() == [0, 3]
    assert cache.tables[0].num_blocks().tolist() == [7, 6] and cache.pages == 2 + 2 + 1


def test_both_scopes_share_across_requests_and_chunks():
    pool = chunk_pool("both")
    caches = [JointCache(pool), JointCache(pool)]
    for cache in caches:
        feed(cache, *repeated_chunks(1, 3).repeat(1, 1, 2, 1, 1, 1))
    assert caches[0].references == 12 and pool.stats()["pages_used"] < 12
    rows = [pages.tolist() for cache in caches for pages in cache.tables[0].pages]
    assert rows[0] == rows[1] == rows[2] == rows[3]
    caches.clear()
    del cache
    assert pool.stats()["pages_used"] == 0
    pool.check_integrity()


@pytest.mark.parametrize("scope", ["batch", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_members_of_a_direction_keep_their_own_norms(dtype, scope):
    policy = FusionPolicy.preset("paper", **PAPER, scope=scope, chunk_tokens=CHUNK)
    _, pool = joint("llama", policy, dtype=dtype)
    base, noise = states(1, CHUNK), states(4, CHUNK, seed=1)
    factor = torch.tensor([1.0, 0.3, 2.5, 7.0]).view(1, 1, 4, 1, 1, 1)
    alike = ((base + 0.3 * noise) * factor).to(dtype)
    if scope == "chunk":
        alike = torch.cat(alike.split(1, 2), 4)
    cache = JointCache(pool)
    feed(cache, *alike)
    assert cache.references == 3 * 8 and cache.pages == 3 * 2
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for layer in range(3):
        table = cache.tables[layer]
        for row, slot in (table.pages >= 0).nonzero().tolist():
            read = read_block(cache, layer, row, slot)
            for side in (0, 1):
                own = alike[side, layer, row, :, slot * BLOCK : (slot + 1) * BLOCK].float().transpose(0, 1)
                torch.testing.assert_close(read[side].norm(), own.norm(), rtol=tolerance, atol=0)
                # Shared, so not the block itself, but near it: keys decide and all four are alike.
                error = (read[side] - own).norm() / own.norm()
                assert tolerance < error < 0.6
                written = cache.pool.blocks.kv.keys[0][table.pages[row, slot]].float().norm()
                assert abs(written - 1) < 1e-2


def test_later_blocks_join_a_direction_with_their_own_norms():
    policy = FusionPolicy.preset("paper", **PAPER)
    _, pool = joint("llama", policy)
    base = states(1, CHUNK)
    first, second = JointCache(pool), JointCache(pool)
    feed(first, *torch.cat((base, 2 * base + 0.2 * states(1, CHUNK, 1)), 2))
    late = 5 * base + 0.5 * states(1, CHUNK, 2)
    feed(second, *late)
    assert pool.stats()["pages_used"] == first.pages == 6
    for layer in range(3):
        for slot in range(2):
            for side, read in enumerate(read_block(second, layer, 0, slot)):
                own = late[side, layer, 0, :, slot * BLOCK : (slot + 1) * BLOCK].transpose(0, 1)
                torch.testing.assert_close(read.norm(), own.norm())


def test_a_direction_is_unscaled_before_it_is_written_on():
    """Cropping into a fused block leaves what was read as it was; the tokens that follow are stored exactly."""
    _, pool = joint("llama", FusionPolicy.preset("paper", **PAPER))
    cache = JointCache(pool)
    base = states(1, CHUNK)
    feed(cache, *torch.cat((base, 3 * base + 0.5 * states(1, CHUNK, 1)), 2))
    before = [read_block(cache, layer, row, 1) for layer in range(3) for row in range(2)]
    cache.crop(-2)
    more = states(2, 2, seed=7)
    for layer, key, value in zip(cache.layers, *more, strict=True):
        layer.update(key, value)
    after = [read_block(cache, layer, row, 1) for layer in range(3) for row in range(2)]
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        layer, row = divmod(index, 2)
        for side in (0, 1):
            torch.testing.assert_close(old[side][: BLOCK - 2], new[side][: BLOCK - 2])
            assert torch.equal(new[side][BLOCK - 2 :], more[side, layer, row].transpose(0, 1))
    cache.check_integrity()


def test_the_paper_preset_leaves_the_outer_layers_alone():
    model, pool = joint("llama", "paper", num_hidden_layers=6)
    prompt = duplicates(3, 20)
    expected = generate(model, prompt, stock_cache(model))
    cache = JointCache(pool)
    # The direction of equal blocks is the block itself up to rounding.
    actual = generate(model, prompt, cache)
    assert torch.equal(expected.sequences, actual.sequences)
    torch.testing.assert_close(actual.logits[-1], expected.logits[-1], rtol=1e-3, atol=1e-3)
    shared = [len(table.held()) - len(table.held().unique()) for table in cache.tables]
    assert shared[:2] == shared[-2:] == [0, 0] and min(shared[2:4]) == 14
    assert [table.k_scale is None for table in cache.tables] == [True, True, False, False, True, True]
    cache.check_integrity()


def test_directions_in_a_model_with_padding_read_the_same_dense_and_paged():
    """Norm-aware reads: the paged attention and the dense copy must agree on scaled blocks."""
    policy = FusionPolicy.preset("paper", **PAPER)
    ids, mask = prompts(9, 22, 30, 30)
    ids[3], mask[3] = ids[2], mask[2]
    ids[3, 5] = 50
    outputs, ratios = [], []
    for attention in ("sdpa", "eager"):
        model, pool = joint("llama", policy, attention=attention, initializer_range=0.05)
        cache = JointCache(pool)
        outputs.append(generate(model, (ids, mask), cache, tokens=20))
        ratios.append(cache.stats()["ratio"])
        assert pool.faults == 0
        cache.check_integrity()
    assert ratios[0] > 1.1
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for paged, dense in zip(outputs[0].logits, outputs[1].logits, strict=True):
        torch.testing.assert_close(paged, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("policy", [FusionPolicy(max_relative_error=10.0), FusionPolicy.preset("paper", **PAPER)])
def test_blocks_that_are_no_numbers_are_refused_and_counted(policy, bad):
    _, pool = joint("llama", policy)
    same = states(1, 3 * BLOCK).repeat(1, 1, 3, 1, 1, 1)
    same[0, 1, :2, 0, BLOCK + 1, 3] = bad
    cache = JointCache(pool)
    feed(cache, *same)
    groups = pool.groups.count
    assert pool.stats()["blocks_not_finite"] == 2
    assert pool.faults == 0
    # Slots 0 and 2 are shared by three rows; slot 1 by none in the group that holds the bad number.
    assert cache.references == 9 * groups
    assert cache.pages == (3 * 3 - 4 if groups == 1 else 3 * 3 + 2)
    assert len(cache.tables[1 if groups > 1 else 0].pages[:, 1].unique()) == 3
    read = read_block(cache, 1, 0, 1)[0]
    assert torch.equal(read.isfinite(), same[0, 1, 0, :, BLOCK : 2 * BLOCK].transpose(0, 1).isfinite())
    feed(cache, *states(3, BLOCK))
    assert cache.references == 12 * groups


def test_blocks_of_zeros_are_handled():
    for policy in (EXACT, FusionPolicy.preset("paper", **PAPER)):
        _, pool = joint("llama", policy)
        cache = JointCache(pool)
        zero = torch.zeros_like(states(3, 2 * BLOCK))
        zero[:, :, 2] = states(1, 2 * BLOCK)[:, :, 0]
        feed(cache, *zero)
        feed(cache, *zero)
        assert pool.faults == 0
        for layer in range(3):
            for row in range(3):
                for slot in range(4):
                    wanted = zero[:, layer, row, :, slot % 2 * BLOCK : (slot % 2 + 1) * BLOCK].transpose(1, 2)
                    torch.testing.assert_close(torch.stack(read_block(cache, layer, row, slot)), wanted)
