"""Crop, reset, reorder, select and repeat: afterwards the cache answers as a stock cache treated the same way."""

import random

import pytest
import torch
from transformers import Cache

from jointkv.errors import LayoutError
from jointkv.hf.cache import JointCache
from jointkv.policy import FusionPolicy
from tests.effort import every_pair
from tests.hf.tiny_models import (
    BLOCK,
    EXACT,
    build_model,
    duplicates,
    generate,
    joint,
    prompts,
    read_block,
    step,
    stock_cache,
)


def crop_to(cache, length):
    """Crop to a length; the stock cache no longer takes a positive number in newer releases."""
    stock = isinstance(cache, Cache) and not isinstance(cache, JointCache)
    cache.crop(min(0, length - cache.get_seq_length()) if stock else length)


POLICIES = {
    "off": "off",
    "exact": EXACT,
    "per_layer": FusionPolicy(max_relative_error=0.0, layer_groups="per_layer", candidates="tokens"),
    "both": FusionPolicy(max_relative_error=0.0, scope="both", chunk_tokens=2 * BLOCK),
}
OPERATIONS = {
    "crop": lambda cache: cache.crop(-5),
    "crop_block": lambda cache: cache.crop(-(2 * BLOCK + 2)),
    "crop_nothing": lambda cache: cache.crop(0),
    "crop_to": lambda cache: crop_to(cache, 9),
    "crop_to_more": lambda cache: crop_to(cache, 500),
    "crop_deep": lambda cache: cache.crop(-20),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "select_one": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "select_mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
    "reorder_same": lambda cache: cache.reorder_cache(torch.tensor([0, 1, 2])),
}


class Twins:
    """A stock cache and a `JointCache` that get the same forward passes and operations."""

    def __init__(self, name="llama", policy="off", attention="sdpa"):
        self.stock = build_model(name, attention=attention)
        self.model, self.pool = joint(name, policy, attention=attention)
        self.theirs, self.ours = stock_cache(self.stock), JointCache(self.pool)
        self.mask = None

    def forward(self, ids, mask=None):
        """The same tokens to both; `mask` says which of these tokens are padding."""
        mask = torch.ones_like(ids) if mask is None else mask
        self.mask = mask if self.mask is None else torch.cat((self.mask, mask), 1)
        new = ids.shape[1]
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        expected = step(self.stock, self.theirs, ids, self.mask, position_ids=positions)
        actual = step(self.model, self.ours, ids, self.mask, position_ids=positions)
        assert self.ours.get_seq_length() == self.theirs.get_seq_length() == self.mask.shape[1]
        seen = self.mask[:, -new:].bool()
        assert torch.equal(expected[seen], actual[seen])
        assert self.pool.faults == 0

    def apply(self, operation):
        for cache in (self.theirs, self.ours):
            operation(cache)
        operation(self)
        self.ours.check_integrity()
        assert self.ours.get_seq_length() == self.theirs.get_seq_length()

    # The operations on the mask that goes with the caches.

    def crop(self, tokens):
        keep = tokens if tokens > 0 else max(0, self.mask.shape[1] + tokens)
        self.mask = self.mask[:, :keep]

    def batch_select_indices(self, indices):
        self.mask = self.mask[indices]

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats):
        self.mask = self.mask.repeat_interleave(repeats, 0)


@every_pair(
    kind={"llama-sdpa": ("llama", "sdpa"), "qwen2-eager": ("qwen2", "eager")}, policy=POLICIES, operation=OPERATIONS
)
def test_operations(kind, policy, operation):
    name, attention = kind
    twins = Twins(name, policy, attention)
    ids, mask = prompts(22, 13, 22)
    ids[2] = ids[0]
    twins.forward(ids, mask)
    twins.apply(operation)
    rows = len(twins.mask)
    for seed in range(3):
        twins.forward(prompts(*[3] * rows, seed=seed)[0])
        twins.forward(prompts(1, seed=seed)[0].repeat(rows, 1))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_random_operations(policy, seed):
    """A long random walk of forward passes and operations, with padding and duplicated rows."""
    choose = random.Random(seed)
    twins = Twins(policy=POLICIES[policy])
    ids, mask = prompts(19, 6, 14, seed=seed)
    twins.forward(ids.repeat(2, 1), mask.repeat(2, 1))
    for number in range(40):
        rows, length = twins.mask.shape
        kind = choose.choice(["forward", "forward", "same", "crop", "select", "reorder", "repeat"])
        if kind in ("forward", "same"):
            size = choose.choice([1, 1, 2, BLOCK, 7])
            text = prompts(*[size] * (rows if kind == "forward" else 1), seed=number)[0]
            twins.forward(text.expand(rows, -1))
        elif kind == "crop" and length > 8:
            amount = choose.randint(1, min(9, length - 8))
            twins.apply(lambda cache, amount=amount: cache.crop(-amount))
        elif kind in ("select", "reorder"):
            count = rows if kind == "reorder" else choose.randint(2, rows)
            picked = torch.tensor([choose.randrange(rows) for _ in range(count)])
            twins.apply(lambda cache, picked=picked: cache.batch_select_indices(picked))
        elif kind == "repeat" and rows <= 3:
            twins.apply(lambda cache: cache.batch_repeat_interleave(2))
    twins.forward(prompts(*[5] * len(twins.mask))[0])
    pool = twins.pool
    twins.ours.reset()
    assert pool.stats()["pages_used"] == 0
    pool.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_reset_starts_anew(policy):
    twins = Twins(policy=POLICIES[policy])
    for rows in (3, 2, 4):
        twins.mask = None
        twins.forward(*duplicates(rows, 14))
        assert twins.ours.batch_size == rows
        twins.ours.reset()
        twins.theirs = stock_cache(twins.stock)
        assert twins.ours.get_seq_length() == 0 and twins.pool.stats()["pages_used"] == 0
        assert twins.ours.references == twins.ours.pages == twins.ours.nbytes == 0


def test_crop_to_nothing_and_on():
    twins = Twins(policy=EXACT)
    twins.forward(*prompts(9, 5))
    twins.ours.crop(-9)
    assert twins.ours.get_seq_length() == twins.ours.pages == twins.pool.stats()["pages_used"] == 0
    twins.theirs, twins.mask = stock_cache(twins.stock), None
    twins.forward(*prompts(4, 8))
    twins.ours.crop(-100)
    assert twins.ours.get_seq_length() == 0


def test_crop_by_a_number_on_the_device():
    """As some releases of transformers say how many drafts were wrong."""
    twins = Twins(policy=EXACT)
    twins.forward(*prompts(9, 5))
    for wrong in (0, -2, -3):
        twins.ours.crop(torch.tensor(wrong))
        twins.theirs.crop(wrong)
        twins.mask = twins.mask[:, : twins.ours.get_seq_length()]
        twins.forward(*prompts(3, 8))


def test_crop_into_padding():
    """What is left of a row may be padding alone; it then starts with the next token."""
    twins = Twins(policy=EXACT)
    ids, mask = prompts(12, 3)
    twins.forward(ids, mask)
    twins.apply(lambda cache: cache.crop(-5))
    assert twins.ours.padding.tolist() == [0, 7]
    twins.forward(*prompts(6, 2))
    assert twins.ours.padding.tolist() == [0, 11]
    twins.forward(prompts(3, 3)[0])


@pytest.mark.parametrize("name", ["gemma3"])
def test_sliding_layers_take_part_in_operations(name):
    twins = Twins(name, EXACT)
    twins.forward(duplicates(2, 7)[0])
    for operation in ("crop", "reorder_same"):
        if operation == "crop":
            twins.apply(lambda cache: cache.crop(-2))
        else:
            twins.apply(lambda cache: cache.batch_repeat_interleave(2))
        twins.forward(prompts(*[3] * len(twins.mask))[0])
    twins.apply(lambda cache: cache.batch_select_indices(torch.tensor([3, 0, 3])))
    twins.apply(lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])))
    for seed in range(8):
        twins.forward(prompts(3, 3, 3, seed=seed)[0])


@pytest.mark.parametrize("policy", ["off", EXACT], ids=["off", "exact"])
def test_copies_of_a_row_share_their_tail_until_they_write(policy):
    twins = Twins(policy=policy)
    twins.forward(prompts(2 * BLOCK + 1)[0])
    used = twins.pool.stats()["pages_used"]
    twins.apply(lambda cache: cache.batch_repeat_interleave(3))
    assert twins.pool.stats()["pages_used"] == used == 3 and twins.ours.references == 9
    twins.forward(torch.tensor([[5], [6], [7]]))
    tails = twins.ours.tables[0].pages[:, 2]
    assert len(tails.unique()) == 3 and twins.pool.stats()["pages_used"] == 5
    twins.forward(prompts(6, 6, 6)[0])
    twins.apply(lambda cache: cache.batch_select_indices(torch.tensor([1])))
    assert twins.pool.stats()["pages_used"] == twins.ours.pages == 4
    twins.forward(prompts(5)[0])


def test_cropping_into_a_fused_block_copies_it_before_writing():
    """Two requests read one page; both go back into it and write something else."""
    twins = Twins(policy=EXACT)
    twins.forward(*duplicates(2, 3 * BLOCK))
    other = JointCache(twins.pool)
    step(twins.model, other, *duplicates(1, 3 * BLOCK))
    kept = [read_block(other, layer, 0, slot) for layer in range(3) for slot in range(3)]
    assert twins.pool.stats()["pages_used"] == 3
    twins.apply(lambda cache: cache.crop(-2))
    assert twins.pool.stats()["pages_used"] == 3
    twins.forward(torch.tensor([[5], [6]]))
    assert twins.pool.stats()["pages_used"] == 5
    twins.forward(prompts(6, 6)[0])
    now = [read_block(other, layer, 0, slot) for layer in range(3) for slot in range(3)]
    assert all(torch.equal(a, b) for old, new in zip(kept, now, strict=True) for a, b in zip(old, new, strict=True))


def test_a_block_that_is_rewritten_is_no_longer_offered_with_its_old_content():
    """One page, read by nobody else, is cropped and rewritten: later requests must not be served by it."""
    stock = build_model("llama")
    # Not 0: K and V of the same text round otherwise in products of other shapes.
    model, pool = joint("llama", FusionPolicy(max_relative_error=1e-4, candidates="both"))
    first = JointCache(pool)
    ids, mask = prompts(2 * BLOCK)
    step(model, first, ids, mask)
    first.crop(-3)
    step(model, first, prompts(2, seed=5)[0])
    later = JointCache(pool)
    expected = generate(stock, (ids, mask), stock_cache(stock))
    assert torch.equal(generate(model, (ids, mask), later).sequences, expected.sequences)
    assert (later.tables[0].pages[0, :2] == first.tables[0].pages[0, :2]).tolist() == [True, False]
    rewritten, index = first.tables[0].pages[0, 1:2], pool.fusers["batch"].index
    assert not index.contains(rewritten).any()
    pool.check_integrity()
    # Filled again, it is offered with its new content.
    step(model, first, torch.tensor([[7]]))
    again = JointCache(pool)
    text = torch.cat((ids[:, : 2 * BLOCK - 3], prompts(2, seed=5)[0], torch.tensor([[7]])), 1)
    for piece in text.split([2 * BLOCK - 3, 2, 1], 1):
        step(model, again, piece)
    assert again.tables[0].pages[0, 1] == rewritten and index.contains(rewritten).all()


def test_blocks_that_fill_again_after_a_crop_are_fused_again():
    twins = Twins(policy=EXACT)
    twins.forward(duplicates(2, 4 * BLOCK)[0])
    for cut in (2, BLOCK + 1, 2 * BLOCK):
        twins.apply(lambda cache, cut=cut: cache.crop(-cut))
        twins.forward(duplicates(2, cut, seed=cut)[0])
        assert twins.ours.pages == 4 and twins.ours.references == 8


def test_a_step_with_another_number_of_rows_is_refused():
    model, pool = joint("llama", "safe")
    cache = JointCache(pool)
    step(model, cache, *prompts(9, 9))
    with pytest.raises(LayoutError, match="3 sequences for a cache of 2"):
        model(input_ids=prompts(1, 1, 1)[0], past_key_values=cache)
    assert cache.length == 9 and cache.references == 6
    pool.check_integrity()


def test_operations_before_the_first_step_change_nothing():
    twins = Twins(policy=EXACT)
    for operation in ("crop", "crop_nothing", "crop_to"):
        OPERATIONS[operation](twins.ours)
    twins.ours.reset()
    twins.ours.reorder_cache(torch.tensor([0, 1]))
    assert twins.ours.batch_size == -1 and twins.ours.stats()["ratio"] == 1.0
    twins.forward(*prompts(9, 3))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_nothing_is_cropped_off_an_empty_cache(name):
    _, pool = joint(name)
    cache = JointCache(pool)
    for tokens in (0, -3, 5):
        cache.crop(tokens)
    assert cache.get_seq_length() == 0
