"""Signatures read straight from pages are those of the plain definition, in every layout and dtype."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.core.blocks import PagedKV
from jointkv.core.packed import BITS, PACKED_DTYPES, PackedPages
from jointkv.core.pool import BlockPool
from jointkv.errors import LayoutError
from jointkv.fusion import signature_native
from jointkv.fusion.signature import BlockSignature
from jointkv.fusion.signature_native import MOST_LENGTH
from tests.core.packings import row_major, shuffled, vnni

ROUNDING = 2e-6
PAGES = 7
SHAPES = [(1, 1, 1, 1), (4, 1, 5, 3), (16, 2, 16, 8), (3, 1, 40, 80), (16, 2, 65, 64)]
"""Tokens, heads, and sizes of K and V."""

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def plain_layers(layers, shape, order, dtype, generator):
    """K and V `[pages, tokens, heads, size]` that lie token by token, head by head, or side by side."""
    tokens, heads, *sizes = shape
    held = torch.randn(layers, PAGES, tokens, heads, sum(sizes), generator=generator).to(dtype)
    if order == "heads":
        held = held.transpose(2, 3).contiguous().transpose(2, 3)
    sides = held.split(sizes, -1)
    return sides if order == "sides" else [side.clone() for side in sides]


@st.composite
def pages_of_any_layout(draw, most_layers=9, most_pages=20, shapes=SHAPES):
    """Pages in either view, and numbers of some of them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layers = draw(st.integers(1, most_layers))
    tokens, heads, *sizes = shape = draw(st.sampled_from(shapes))
    if draw(st.booleans()):
        order, dtype = draw(st.sampled_from(["tokens", "heads", "sides"])), draw(st.sampled_from(PACKED_DTYPES[:3]))
        kv = PagedKV(*map(list, plain_layers(layers, shape, order, dtype, generator)))
    else:
        dtype = draw(st.sampled_from(PACKED_DTYPES))
        slots = draw(st.sampled_from([row_major(tokens, heads * sizes[0], heads * sizes[1]), vnni(1, 8)]))
        slots = shuffled(slots, generator) if draw(st.booleans()) else slots
        gap, block_size = draw(st.sampled_from([0, 7])), (int(slots.max()) + 1) // 2
        held = [torch.randn(PAGES, len(slots) + gap, generator=generator).to(dtype) for _ in range(layers)]
        kv = PackedPages([layer[:, : len(slots)] for layer in held], slots % block_size, slots >= block_size)
    return kv, torch.randint(PAGES, (draw(st.integers(1, most_pages)),), generator=generator)


@needs_compiler
@settings(deadline=None, max_examples=120)
@given(case=pages_of_any_layout(), threads=st.sampled_from([1, 3]))
def test_the_kernel_is_the_definition(case, threads):
    kv, pages = case
    signature = BlockSignature(kv)
    assert isinstance(signature._kernel(kv), signature_native.NativeSignatures)
    torch.set_num_threads(threads)
    found = signature(kv, pages)
    torch.set_num_threads(1)
    torch.testing.assert_close(found, signature.reference(kv, pages), rtol=0, atol=ROUNDING)


@needs_compiler
@pytest.mark.parametrize("size", [MOST_LENGTH - 1, MOST_LENGTH, 2 * MOST_LENGTH + 33])
def test_blocks_that_are_cut_to_runs(size):
    kv = PagedKV([torch.randn(3, 1, 1, size)], [torch.randn(3, 1, 1, 1)])
    signature = BlockSignature(kv)
    pages = torch.arange(3)
    torch.testing.assert_close(signature(kv, pages), signature.reference(kv, pages), rtol=0, atol=ROUNDING)


def beside_one(dtype):
    """Pages whose K, and V, is one of all numbers of a type, and 1."""
    codes = torch.arange(2 ** (8 * dtype.itemsize)).to(BITS[dtype.itemsize])
    ones = torch.ones(1).to(dtype).view(codes.dtype).expand_as(codes)
    layer = torch.stack((codes, ones, ones, codes), 1).contiguous().view(dtype)
    return PackedPages([layer], torch.zeros(4, dtype=torch.long), torch.arange(4) >= 2)


@needs_compiler
@pytest.mark.parametrize("dtype", PACKED_DTYPES[1:], ids=str)
def test_every_number_of_a_type_is_read_right(dtype):
    kv = beside_one(dtype)
    signature, pages = BlockSignature(kv), torch.arange(kv.num_pages)
    expected = signature.reference(kv, pages)
    torch.testing.assert_close(signature(kv, pages), expected, rtol=0, atol=ROUNDING, equal_nan=True)


@needs_compiler
def test_pages_of_a_pool_that_has_grown_and_of_another_layout():
    pool = BlockPool(3, 4, (2, 8), (2, 8))
    signature = BlockSignature(pool.kv)
    slots = row_major(4, 16, 16)
    packed = PackedPages([torch.randn(5, 128)] * 3, slots % 4, slots >= 4)
    before = pool.num_pages
    for _ in range(3):
        for layer in (*pool.kv.keys, *pool.kv.values):
            layer.copy_(torch.randn(layer.shape))
        pages = torch.tensor([1, pool.num_pages, 2])
        for kv, asked in ((pool.kv, pages), (packed, pages % 5)):
            torch.testing.assert_close(
                signature(kv, asked), signature.reference(kv, asked), rtol=0, atol=ROUNDING, equal_nan=True
            )
        pool.allocate(pool.num_free + 1)
    assert pool.num_pages > before


def test_layers_that_lie_differently_are_gathered():
    apart = torch.randn(5, 2, 4, 8).transpose(1, 2)
    kv = PagedKV([torch.randn(5, 4, 2, 8), apart], [torch.randn(5, 4, 2, 8) for _ in range(2)])
    signature, pages = BlockSignature(kv), torch.tensor([4, 0])
    assert signature._kernel(kv) is None
    assert torch.equal(signature(kv, pages), signature.reference(kv, pages))


def test_without_a_compiler_signatures_are_the_plain_ones(monkeypatch):
    monkeypatch.setattr(signature_native, "kernel", lambda: None)
    kv = PagedKV([torch.randn(5, 4, 2, 8)], [torch.randn(5, 4, 2, 8)])
    signature, pages = BlockSignature(kv), torch.tensor([4, 0, 4])
    assert torch.equal(signature(kv, pages), signature.reference(kv, pages))


@pytest.mark.parametrize(
    ("pages", "error"), [([0, 5], IndexError), ([-1], IndexError), ([[0]], LayoutError), ([0.5], LayoutError)]
)
def test_wrong_page_numbers_are_refused(pages, error):
    kv = PagedKV([torch.randn(5, 4, 2, 8)], [torch.randn(5, 4, 2, 8)])
    with pytest.raises(error):
        BlockSignature(kv)(kv, torch.tensor(pages))


@needs_compiler
def test_blocks_of_another_size_are_refused():
    signature = BlockSignature(PagedKV([torch.randn(5, 4, 2, 8)], [torch.randn(5, 4, 2, 8)]))
    kv = PagedKV([torch.randn(5, 4, 2, 8)], [torch.randn(5, 4, 2, 4)])
    with pytest.raises(LayoutError, match=r"\[64, 32\]"):
        signature(kv, torch.tensor([0]))


def test_pages_on_two_devices_are_not_given_to_the_kernel():
    keys = [torch.randn(PAGES, 4, 1, 8)]
    signature = BlockSignature(PagedKV(keys, keys))
    assert signature._kernel(PagedKV(keys, [keys[0].to("meta")])) is None
