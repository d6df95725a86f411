"""The attention function that reads pages, against the reference and against stock attention."""

import types

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from jointkv.attention.reference import paged_attention
from jointkv.attention.tokens import token_scales, token_slots
from jointkv.core.plan import BlockRef
from jointkv.errors import UnsupportedModel
from jointkv.hf import attention
from jointkv.hf.attention import PagedLayer, attach_pages, paged_attention_forward, register_attention
from jointkv.hf.cache import JointCache
from jointkv.policy import FusionPolicy
from tests.hf.tiny_models import BLOCK, assert_same_output, build_model, generate, joint, prompts, stock_cache

MODULE = types.SimpleNamespace(num_key_value_groups=2, is_causal=True)
HEADS, SIZE = 2, 8


def random_layer(rows=3, length=14, scaled=False, value_size=SIZE, padded=True, dtype=torch.float32):
    """Random pages of left-padded rows that share some, and the block references of each row."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(12, BLOCK, HEADS, SIZE, generator=generator)
    values = torch.randn(12, BLOCK, HEADS, value_size, generator=generator)
    keys[0], values[0] = 0, 0
    blocks = -(-length // BLOCK)
    tables = torch.randint(1, 12, (rows, blocks), generator=generator)
    padding = torch.arange(rows) * (3 if padded else 0)
    scales = torch.rand(2, rows, blocks, generator=generator) + 0.5 if scaled else torch.ones(2, rows, blocks)
    refs = []
    for row in range(rows):
        tokens = length - int(padding[row])
        refs.append(
            [
                BlockRef(
                    int(tables[row, slot]),
                    float(scales[0, row, slot]),
                    float(scales[1, row, slot]),
                    count=min(BLOCK, tokens - slot * BLOCK),
                )
                for slot in range(-(-tokens // BLOCK))
            ]
        )
    spread = [token_scales(scale, BLOCK, padding, length) if scaled else None for scale in scales]
    slots = token_slots(tables, BLOCK, padding, length)
    return PagedLayer(keys.to(dtype), values.to(dtype), slots, *spread), refs, padding


def causal_mask(padding, queries, length):
    token = torch.arange(length)
    causal = token <= torch.arange(length - queries, length)[:, None]
    return causal[None, None] & (token >= padding[:, None])[:, None, None, :]


def attend(layer, queries, padding, **options):
    length = layer.slots.shape[1]
    rows = layer.slots.shape[0]
    query = torch.randn(rows, 2 * HEADS, queries, SIZE, generator=torch.Generator().manual_seed(1))
    query = query.to(layer.keys.dtype)
    key = attach_pages(torch.zeros(rows, HEADS, queries, SIZE, dtype=query.dtype), layer)
    value = torch.zeros(rows, HEADS, queries, layer.values.shape[-1], dtype=query.dtype)
    mask = causal_mask(padding, queries, length)
    return query, paged_attention_forward(MODULE, query, key, value, mask, **options)[0]


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("value_size", [SIZE, 6])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_it_computes_what_the_reference_defines(scaling, scaled, value_size, queries):
    layer, refs, padding = random_layer(scaled=scaled, value_size=value_size)
    query, output = attend(layer, queries, padding, scaling=scaling)
    assert output.shape == (3, queries, 2 * HEADS, value_size) and output.is_contiguous()
    flat = query.transpose(1, 2).flatten(0, 1)
    expected, _ = paged_attention(flat, [queries] * 3, layer.keys, layer.values, refs, scale=scaling)
    torch.testing.assert_close(output.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)
    if scaled:
        plain = PagedLayer(layer.keys, layer.values, layer.slots)
        assert not torch.allclose(output, attend(plain, queries, padding, scaling=scaling)[1], atol=1e-3)


def test_bfloat16_is_within_rounding_of_the_reference():
    layer, refs, padding = random_layer(scaled=True, dtype=torch.bfloat16)
    query, output = attend(layer, 2, padding)
    flat = query.transpose(1, 2).flatten(0, 1)
    expected, _ = paged_attention(flat, [2] * 3, layer.keys, layer.values, refs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.flatten(0, 1), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("workspace", [1, 2 * 14 * HEADS * 2 * SIZE * 4])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_rows_in_turns_give_the_same(monkeypatch, scaled, workspace):
    layer, _, padding = random_layer(rows=5, scaled=scaled)
    _, together = attend(layer, 3, padding)
    sizes = []
    read = PagedLayer.read
    monkeypatch.setattr(PagedLayer, "read", lambda self, rows: sizes.append(rows) or read(self, rows))
    monkeypatch.setattr(attention, "WORKSPACE_BYTES", workspace)
    _, in_turns = attend(layer, 3, padding)
    assert len(sizes) == (5 if workspace == 1 else 3)
    torch.testing.assert_close(in_turns, together, rtol=0, atol=1e-6)


def test_one_mask_for_all_rows():
    layer, _, padding = random_layer(padded=False)
    query, expected = attend(layer, 2, padding)
    key = attach_pages(torch.zeros(3, HEADS, 2, SIZE), layer)
    mask = causal_mask(padding, 2, 14)[:1]
    torch.testing.assert_close(paged_attention_forward(MODULE, query, key, key, mask)[0], expected)


def test_generation_with_a_small_workspace(monkeypatch):
    stock = build_model("llama")
    prompt = prompts(17, 4, 23, 9)
    expected = generate(stock, prompt, stock_cache(stock))
    monkeypatch.setattr(attention, "WORKSPACE_BYTES", 1)
    model, pool = joint("llama")
    actual = generate(model, prompt, JointCache(pool))
    assert torch.equal(expected.sequences, actual.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["softcap", "position_bias", "s_aux", "head_mask"])
def test_what_it_cannot_do_is_refused_by_name(name):
    layer, _, _ = random_layer()
    query = torch.zeros(3, 2 * HEADS, 1, SIZE)
    key = attach_pages(torch.zeros(3, HEADS, 1, SIZE), layer)
    with pytest.raises(UnsupportedModel, match=rf"{name}.*eager"):
        paged_attention_forward(MODULE, query, key, key, None, **{name: torch.ones(1)})
    assert paged_attention_forward(MODULE, query, key, key, None, **{name: None})[0].shape == (3, 1, 4, SIZE)


@pytest.mark.parametrize("queries", [1, 6])
def test_without_pages_it_is_sdpa(queries):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, queries, SIZE, generator=generator)
    key, value = (torch.randn(2, HEADS, 6, SIZE, generator=generator) for _ in range(2))
    mask = causal_mask(torch.tensor([0, 2]), queries, 6)
    mask[:, :, 0, 0] = True
    for given in (mask, None):
        expected = sdpa_attention_forward(MODULE, query, key, value, given, scaling=0.3)[0]
        assert torch.equal(paged_attention_forward(MODULE, query, key, value, given, scaling=0.3)[0], expected)


def test_registering_twice_changes_nothing():
    register_attention()
    register_attention()
    assert AttentionInterface()["jointkv"] is paged_attention_forward
    assert AttentionMaskInterface()["jointkv"] is sdpa_mask


def test_the_pages_of_a_cache_with_directions_match_the_reference():
    """What the last layer of a model attends to, with scales and padding, as block references say it."""
    policy = FusionPolicy.preset("paper", skip_first_layers=0, skip_last_layers=0)
    model, pool = joint("llama", policy, initializer_range=0.05)
    ids, mask = prompts(21, 13)
    cache = JointCache(pool)
    generate(model, (ids.repeat(2, 1), mask.repeat(2, 1)), cache, tokens=9)
    assert cache.tables[2].k_scale is not None
    length, calls = cache.length, []
    original = PagedLayer.read

    def read(self, rows=slice(None)):
        calls.append(original(self, rows))
        return calls[-1]

    PagedLayer.read = read
    try:
        model(
            input_ids=ids[:1, -1:].repeat(4, 1),
            past_key_values=cache,
            attention_mask=torch.cat(
                (mask.repeat(2, 1), torch.ones(4, length + 1 - mask.shape[1], dtype=torch.long)), 1
            ),
        )
    finally:
        PagedLayer.read = original
    keys, values = calls[2]
    table, kv = cache.tables[2], pool.blocks.kv
    query = torch.randn(4, 4, SIZE, generator=torch.Generator().manual_seed(0))
    for row in range(4):
        tokens = length + 1 - int(cache.padding[row])
        refs = [table.ref(row, slot) for slot in range(-(-tokens // BLOCK))]
        refs[-1] = BlockRef(refs[-1].page, refs[-1].k_scale, refs[-1].v_scale, count=(tokens - 1) % BLOCK + 1)
        expected, _ = paged_attention(query[row : row + 1], [1], kv.keys[0], kv.values[0], [refs])
        dense = torch.nn.functional.scaled_dot_product_attention(
            query[row, None, :, None], keys[row, None, :, -tokens:], values[row, None, :, -tokens:], enable_gqa=True
        )
        torch.testing.assert_close(dense[0, :, 0], expected[0], rtol=1e-5, atol=1e-5)


def test_one_layer_groups_read_the_pages_of_their_own_group():
    """Layer `i` of `n` is member `i % layers` of group `i // layers`."""
    stock = build_model("llama", num_hidden_layers=4)
    prompt = prompts(17, 9)
    expected = generate(stock, prompt, stock_cache(stock))
    for groups in (1, 2, 4):
        policy = FusionPolicy(max_relative_error=0.0, layer_groups=groups)
        model, pool = joint("llama", policy, num_hidden_layers=4)
        cache = JointCache(pool)
        assert_same_output(expected, generate(model, prompt, cache))
        assert len(cache.tables) == groups and pool.groups.layers * groups == 4
        assert cache.nbytes == 4 * 2 * BLOCK * HEADS * SIZE * 4 * (7 + 5)
