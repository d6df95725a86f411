"""`PackedPages` refuses layouts it does not know, and reads any order of elements as the blocks they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.core import blocks
from jointkv.core.blocks import served_errors
from jointkv.core.packed import LANES, PACKED_DTYPES, PackedPages, lane_order
from jointkv.errors import LayoutError
from tests.core.packings import pack, row_major, shuffled

ELEMENTS = 24


def layer(pages=3, elements=ELEMENTS, dtype=torch.float32):
    return torch.ones(pages, elements).to(dtype)


def layout(elements=ELEMENTS, tokens=4):
    element = torch.arange(elements)
    return element % tokens, element >= elements // 2


def overlapping():
    return torch.ones(3 * ELEMENTS).as_strided((3, ELEMENTS), (ELEMENTS - 1, 1))


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [layer()[0]],
        [layer(dtype=torch.float64)],
        [layer(dtype=torch.int8)],
        [torch.ones(3, 2 * ELEMENTS)[:, ::2]],
        [overlapping()],
        [layer(), layer(pages=4)],
        [layer(), layer(dtype=torch.bfloat16)],
        [layer(), torch.ones(3, 2 * ELEMENTS)[:, :ELEMENTS]],
        [layer(), torch.empty(3, ELEMENTS, device="meta")],
    ],
)
def test_other_pages_are_refused(layers):
    with pytest.raises(LayoutError):
        PackedPages(layers, *layout())


def changed(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


TOKEN_OF, IS_VALUE = layout()


@pytest.mark.parametrize(
    ("token_of", "is_value"),
    [
        (TOKEN_OF.int(), IS_VALUE),
        (TOKEN_OF, IS_VALUE.long()),
        (TOKEN_OF[1:], IS_VALUE[1:]),
        (TOKEN_OF[None], IS_VALUE[None]),
        (changed(TOKEN_OF, 0, -1), IS_VALUE),
        (changed(TOKEN_OF, 0, 2**40), IS_VALUE),
        (changed(TOKEN_OF, 0, 1), IS_VALUE),
        (TOKEN_OF, changed(IS_VALUE, 0, True)),
        (TOKEN_OF * 2, IS_VALUE),
        (TOKEN_OF, torch.zeros_like(IS_VALUE)),
        (TOKEN_OF, TOKEN_OF == 3),
    ],
)
def test_tokens_of_unequal_size_are_refused(token_of, is_value):
    PackedPages([layer()], TOKEN_OF, IS_VALUE)
    with pytest.raises(LayoutError):
        PackedPages([layer()], token_of, is_value)


def test_a_page_without_elements_is_refused():
    with pytest.raises(LayoutError):
        PackedPages([layer(elements=0)], TOKEN_OF[:0], IS_VALUE[:0])


def test_sizes_count_every_layer_and_not_what_lies_between_pages():
    wide = torch.ones(5, 2 * ELEMENTS, dtype=torch.bfloat16)
    pages = PackedPages([wide[:, :ELEMENTS], wide[:, ELEMENTS:]], *layout())
    assert (pages.num_layers, pages.num_pages, pages.block_size) == (2, 5, 4)
    assert pages.page_nbytes == 2 * ELEMENTS * 2
    assert pages.device == wide.device


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from(PACKED_DTYPES),
    aggregate=st.sampled_from(["rms", "max"]),
)
def test_any_order_reads_as_the_blocks_it_holds(seed, tokens, sizes, dtype, aggregate):
    generator = torch.Generator().manual_seed(seed)
    keys, values = ([torch.randn(4, tokens, 1, size, generator=generator) for _ in range(3)] for size in sizes)
    plain, pages = pack(keys, values, dtype, shuffled(row_major(tokens, *sizes), generator))
    index = torch.tensor([3, 0, 0, 2])
    for mine, theirs in zip(pages.vectors(index), plain.vectors(index), strict=True):
        mine, theirs = (side.unflatten(-1, (tokens, -1)).sort(-1).values for side in (mine, theirs))
        assert torch.equal(mine, theirs)
    own, other = torch.randint(4, (2, 6), generator=generator)
    for mine, theirs in zip(
        served_errors(pages, own, other, aggregate), served_errors(plain, own, other, aggregate), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_batches_cover_every_block_once_whatever_their_size(monkeypatch):
    pages = PackedPages([layer()] * 2, *layout())
    for bytes_at_a_time in (1, 200, 1 << 20):
        monkeypatch.setattr(blocks, "VECTORS_BYTES", bytes_at_a_time)
        assert [i for part in pages.batches(7) for i in range(7)[part]] == list(range(7))


def test_pages_out_of_range_are_an_error():
    with pytest.raises(IndexError):
        PackedPages([layer()], *layout()).vectors(torch.tensor([3]))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.integers(1, 6),
    size=st.integers(1, 40),
    shuffle=st.booleans(),
    dtype=st.sampled_from(PACKED_DTYPES),
)
def test_runs_of_patterns_cover_every_whole_row_once(seed, tokens, size, shuffle, dtype):
    slots = row_major(tokens, size, size)
    if shuffle:
        slots = shuffled(slots, torch.Generator().manual_seed(seed))
    pages = PackedPages([layer(elements=len(slots), dtype=dtype)], slots % tokens, slots >= tokens)
    rows = pages.row_patterns
    filled = torch.nn.functional.pad(slots, (0, -len(slots) % LANES)).view(-1, LANES)
    assert torch.equal(rows.slot.long(), filled[:, lane_order(dtype)])
    seen = []
    for pattern, row in enumerate(rows.pattern_row.tolist()):
        fold = int(rows.fold[pattern])
        assert torch.equal(rows.slot[row], rows.slot[row][:fold].repeat(LANES // fold))
        for run in range(int(rows.first_run[pattern]), int(rows.first_run[pattern + 1])):
            mine = range(int(rows.run_row[run]), int(rows.run_row[run] + rows.run_length[run]))
            assert all(torch.equal(rows.slot[other], rows.slot[row]) for other in mine)
            seen += mine
    assert sorted(seen) == list(range(len(slots) // LANES))
