"""Signatures read straight from pages are those of the plain definition, in every dtype."""

import shutil
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.core.blocks import SUPPORTED_DTYPES, PagedKV
from jointkv.core.packed import PACKED_DTYPES, PackedPages
from jointkv.core.pool import BlockPool
from jointkv.errors import LayoutError
from jointkv.fusion.kernels.cpu import RUN
from jointkv.fusion.signature import BlockSignature
from tests.core.packings import pack, row_major, shuffled, vnni

ROUNDING = 2e-6
PAGES = 7
SHAPES = [(1, 1, 1, 1), (4, 1, 5, 3), (16, 2, 16, 8), (3, 1, 40, 80), (16, 2, 65, 64)]
"""Tokens, heads, and sizes of K and V."""

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@st.composite
def contiguous_pages(draw, most_layers=9, most_pages=20, shapes=SHAPES):
    """Pages, and numbers of some of them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layers, dtype = draw(st.integers(1, most_layers)), draw(st.sampled_from(SUPPORTED_DTYPES))
    tokens, heads, *sizes = draw(st.sampled_from(shapes))
    sides = (
        [torch.randn(PAGES, tokens, heads, size, generator=generator).to(dtype) for _ in range(layers)]
        for size in sizes
    )
    return PagedKV(*sides), torch.randint(PAGES, (draw(st.integers(1, most_pages)),), generator=generator)


@needs_compiler
@settings(max_examples=120)
@given(case=contiguous_pages(), threads=st.sampled_from([1, 3]))
def test_the_kernel_is_the_definition(case, threads):
    kv, pages = case
    signature = BlockSignature(kv)
    assert signature._kernel(kv) is not None
    torch.set_num_threads(threads)
    found = signature(kv, pages)
    torch.set_num_threads(1)
    torch.testing.assert_close(found, signature.reference(kv, pages), rtol=0, atol=ROUNDING)


@st.composite
def packed_pages(draw, shapes=((4, 5, 3), (16, 64, 64), (3, 40, 80))):
    """Pages whose elements lie in an order of their own, with room between pages, and numbers of some of them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    slots = draw(st.sampled_from([*(row_major(*shape) for shape in shapes), vnni(2, 32)]))
    if draw(st.booleans()):
        slots = shuffled(slots, generator)
    tokens, dtype = int(slots.max() + 1) // 2, draw(st.sampled_from(PACKED_DTYPES))
    rows = [torch.randn(PAGES, len(slots) + 8, generator=generator).to(dtype) for _ in range(draw(st.integers(1, 3)))]
    pages = PackedPages([row[:, : len(slots)] for row in rows], slots % tokens, slots >= tokens)
    return pages, torch.randint(PAGES, (draw(st.integers(1, 20)),), generator=generator)


@needs_compiler
@settings(max_examples=80)
@given(case=packed_pages())
def test_pages_in_an_order_of_their_own_have_the_signatures_of_their_blocks(case):
    pages, asked = case
    signature = BlockSignature(pages)
    assert signature._kernel(pages) is not None
    torch.testing.assert_close(signature(pages, asked), signature.reference(pages, asked), rtol=0, atol=ROUNDING)


@needs_compiler
@pytest.mark.parametrize("size", [RUN - 1, RUN, 2 * RUN + 33])
def test_blocks_that_are_cut_to_runs(size):
    kv = PagedKV([torch.randn(3, 1, 1, size)], [torch.randn(3, 1, 1, 1)])
    signature = BlockSignature(kv)
    pages = torch.arange(3)
    torch.testing.assert_close(signature(kv, pages), signature.reference(kv, pages), rtol=0, atol=ROUNDING)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_a_type_is_read_right(dtype):
    codes = torch.arange(2**16).to(torch.int16).view(dtype)
    layer = torch.stack((codes, torch.ones_like(codes)), 1).view(-1, 2, 1, 1)
    kv = PagedKV([layer], [layer.flip(1).contiguous()])
    signature, pages = BlockSignature(kv), torch.arange(kv.num_pages)
    expected = signature.reference(kv, pages)
    torch.testing.assert_close(signature(kv, pages), expected, rtol=0, atol=ROUNDING, equal_nan=True)


@needs_compiler
def test_pages_of_a_pool_that_has_grown_and_of_another_type():
    pool = BlockPool(3, 4, (2, 8), (2, 8))
    signature = BlockSignature(pool.kv)
    other = PagedKV(*([torch.randn(5, 4, 2, 8).bfloat16() for _ in range(3)] for _ in range(2)))
    before = pool.num_pages
    for _ in range(3):
        for layer in (*pool.kv.keys, *pool.kv.values):
            layer.copy_(torch.randn(layer.shape))
        pages = torch.tensor([1, pool.num_pages, 2])
        for kv, asked in ((pool.kv, pages), (other, pages % 5)):
            torch.testing.assert_close(
                signature(kv, asked), signature.reference(kv, asked), rtol=0, atol=ROUNDING, equal_nan=True
            )
        pool.allocate(pool.num_free + 1)
    assert pool.num_pages > before


def test_pages_that_are_not_contiguous_are_gathered():
    apart = torch.randn(5, 2, 4, 8).transpose(1, 2)
    kv = PagedKV([torch.randn(5, 4, 2, 8), apart], [torch.randn(5, 4, 2, 8) for _ in range(2)])
    signature, pages = BlockSignature(kv), torch.tensor([4, 0])
    assert signature._kernel(kv) is None
    assert torch.equal(signature(kv, pages), signature.reference(kv, pages))


def test_without_a_compiler_signatures_are_the_plain_ones(monkeypatch):
    monkeypatch.setattr("jointkv.fusion.signature.kernels_for", lambda device: None)
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


def test_an_order_lives_as_long_as_a_kernel_is_known_by_its_id():
    """When it is gone another one may have its id, and pages would be read in the wrong order."""
    generator = torch.Generator().manual_seed(0)
    keys, values = ([torch.randn(3, 4, 2, 16, generator=generator)] for _ in range(2))
    _, packed = pack(keys, values, torch.float32, row_major(4, 32, 32))
    signature = BlockSignature(packed)
    signature(packed, torch.arange(3))
    orders = [weakref.ref(side.order) for side in packed.sides]
    del packed
    assert all(order() is not None for order in orders)
    _, other = pack(keys, values, torch.float32, shuffled(row_major(4, 32, 32), generator))
    torch.testing.assert_close(signature(other, torch.arange(3)), signature.reference(other, torch.arange(3)))
    assert all(order() is None for order in orders)
