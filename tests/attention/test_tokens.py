"""Token addresses against their definition, and what is written is what is read, with left padding."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.attention.tokens import read_tokens, token_scales, token_slots, write_tokens
from jointkv.core.pool import NULL_PAGE

HEADS, SIZE = 2, 3


@st.composite
def batches(draw):
    """Block tables of left-padded rows of equal length: pages, block size, padding, length."""
    block_size = draw(st.integers(1, 4))
    length = draw(st.integers(1, 11))
    rows = draw(st.integers(1, 4))
    padded = draw(st.booleans())
    padding = [draw(st.integers(0, length)) if padded else 0 for _ in range(rows)]
    blocks = [-(-(length - pad) // block_size) for pad in padding]
    width = max(1, *blocks) + draw(st.integers(0, 2))  # tables are wider than they need to be
    numbers = iter(draw(st.permutations(range(1, sum(blocks) + 1))))
    pages = torch.tensor([[next(numbers) if i < count else -1 for i in range(width)] for count in blocks])
    return pages, block_size, torch.tensor(padding), length


def address(pages, block_size, padding, row, column):
    """Page and offset of a token, by definition; None for padding."""
    token = column - int(padding[row])
    if token < 0:
        return None
    return int(pages[row, token // block_size]), token % block_size


@settings(max_examples=100)
@given(batches())
def test_slots_address_each_token_and_padding_reads_the_null_page(batch):
    pages, block_size, padding, length = batch
    slots = token_slots(pages, block_size, padding, length)
    assert slots.shape == (len(pages), length)
    for row in range(len(pages)):
        for column in range(length):
            found = address(pages, block_size, padding, row, column) or (NULL_PAGE, 0)
            assert int(slots[row, column]) == found[0] * block_size + found[1]


@settings(max_examples=100)
@given(batches(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 999))
def test_what_is_written_is_read_times_its_scale(batch, dtype, seed):
    pages, block_size, padding, length = batch
    generator = torch.Generator().manual_seed(seed)
    rows = len(pages)
    layer = torch.zeros(int(pages.max().clamp(min=0)) + 1, block_size, HEADS, SIZE, dtype=dtype)
    states = torch.randn(rows, HEADS, length, SIZE, generator=generator).to(dtype)
    scale = 2.0 ** torch.randint(-2, 3, pages.shape, generator=generator)  # exact in every dtype
    slots = token_slots(pages, block_size, padding, length)
    inside = torch.arange(length) >= padding[:, None]
    write_tokens(layer, slots[inside], states.transpose(1, 2)[inside])
    assert not layer[NULL_PAGE].any()
    spread = token_scales(scale, block_size, padding, length)
    plain, scaled = read_tokens(layer, slots), read_tokens(layer, slots, spread)
    assert plain.shape == states.shape and plain.dtype == scaled.dtype == dtype
    for row in range(rows):
        for column in range(length):
            where = address(pages, block_size, padding, row, column)
            if where is None:
                assert spread[row, column] == 1
                assert not plain[row, :, column].any() and not scaled[row, :, column].any()
                continue
            token, factor = column - int(padding[row]), scale[row, (column - int(padding[row])) // block_size]
            assert token >= 0 and spread[row, column] == factor
            assert torch.equal(plain[row, :, column], states[row, :, column])
            assert torch.equal(layer[where], states[row, :, column])
            assert torch.equal(scaled[row, :, column], (states[row, :, column] * factor).to(dtype))


def test_writing_touches_only_the_named_slots():
    layer = torch.zeros(3, 2, HEADS, SIZE)
    write_tokens(layer, torch.tensor([5, 2]), torch.ones(2, HEADS, SIZE) * torch.tensor([1.0, 2.0]).view(2, 1, 1))
    assert layer[:, :, 0, 0].tolist() == [[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]]


def test_what_is_read_is_a_copy():
    layer = torch.ones(2, 2, HEADS, SIZE)
    read = read_tokens(layer, torch.tensor([[2, 3]]))
    read += 1
    assert (layer == 1).all()
