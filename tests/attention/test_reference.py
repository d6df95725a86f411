"""The reference attention against dense softmax attention over blocks put together token by token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.attention.reference import paged_attention
from jointkv.core.plan import BlockRef
from jointkv.errors import LayoutError
from tests.attention.rotary import rotary_turn

PAGES = 6
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
THETA = 100.0


def dense(query, keys, values, scale):
    """Causal attention of the last queries, head by head and query by query, in float64.

    Args:
        query: `[q, heads, d]`; keys, values: `[n, kv heads, d]`.
    """
    asked, heads, _ = query.shape
    length, kv_heads, _ = keys.shape
    output = np.zeros((asked, heads, values.shape[2]))
    log_sum = np.zeros((asked, heads))
    for i in range(asked):
        seen = length - asked + i + 1
        for head in range(heads):
            kv_head = head * kv_heads // heads
            logits = scale * keys[:seen, kv_head] @ query[i, head]
            weights = np.exp(logits - logits.max())
            log_sum[i, head] = np.log(weights.sum()) + logits.max()
            output[i, head] = weights @ values[:seen, kv_head] / weights.sum()
    return output, log_sum


def gather(pages, table, scale_name):
    """The tokens that the references name, times their scales: float64 `[n, h, d]`."""
    parts = [
        pages[ref.page, ref.first : ref.first + ref.count].double().numpy() * getattr(ref, scale_name) for ref in table
    ]
    return np.concatenate(parts)


def random_table(draw, block_size, *, scaled, ranged):
    refs = []
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, block_size - 1)) if ranged else 0
        count = draw(st.integers(1, block_size - first)) if ranged else block_size
        scales = [draw(st.floats(0.25, 4.0)) if scaled else 1.0 for _ in range(2)]
        refs.append(BlockRef(draw(st.integers(0, PAGES - 1)), *scales, first=first, count=count))
    return refs


@settings(max_examples=150)
@given(st.data())
def test_paged_attention_is_dense_attention_over_the_same_tokens(data):
    draw = data.draw
    dtype = draw(st.sampled_from(list(ROUNDING)), label="dtype")
    block_size, kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    size, value_size = draw(st.sampled_from([2, 8])), draw(st.sampled_from([3, 8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scaled, ranged = draw(st.booleans(), label="scaled"), draw(st.booleans(), label="ranged")
    tables = [random_table(draw, block_size, scaled=scaled, ranged=ranged) for _ in range(draw(st.integers(1, 3)))]
    tokens = [sum(ref.count for ref in table) for table in tables]
    lengths = [draw(st.sampled_from([1, n]) | st.integers(1, n)) for n in tokens]
    keys = torch.randn(PAGES, block_size, kv_heads, size, generator=generator).to(dtype)
    values = torch.randn(PAGES, block_size, kv_heads, value_size, generator=generator).to(dtype)
    query = torch.randn(sum(lengths), kv_heads * group, size, generator=generator).to(dtype)
    scale = draw(st.none() | st.floats(0.1, 1.0))
    output, log_sum = paged_attention(query, lengths, keys, values, tables, scale=scale)
    assert output.dtype == dtype and output.shape == (*query.shape[:2], value_size)
    assert log_sum.dtype == torch.float32 and log_sum.shape == query.shape[:2]
    for rows, sums, asked, table in zip(
        output.split(lengths), log_sum.split(lengths), query.split(lengths), tables, strict=True
    ):
        expected, expected_sum = dense(
            asked.double().numpy(),
            gather(keys, table, "k_scale"),
            gather(values, table, "v_scale"),
            size**-0.5 if scale is None else scale,
        )
        tolerance = ROUNDING[dtype]
        np.testing.assert_allclose(rows.double().numpy(), expected, rtol=tolerance, atol=4 * tolerance)
        np.testing.assert_allclose(sums.numpy(), expected_sum, rtol=1e-4, atol=1e-4)


def test_a_query_does_not_see_later_tokens():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 4, 1, 8, generator=generator)
    query = torch.randn(5, 2, 8, generator=generator)
    tables = [[BlockRef(0, count=4), BlockRef(1, count=4)]]
    before, _ = paged_attention(query, [5], keys, values, tables)
    keys[1, 3] += 1.0
    values[1, 3] += 1.0
    after, _ = paged_attention(query, [5], keys, values, tables)
    assert torch.equal(before[:4], after[:4])
    assert not torch.allclose(before[4], after[4], atol=1e-3)


def complex_turn(vectors, positions, frequencies, style):
    """Rotary embedding as multiplication of complex numbers by exp(i position frequency), in float64."""
    half = len(frequencies)
    turned = vectors.copy()
    real, imaginary = (
        (slice(0, half), slice(half, 2 * half)) if style == "neox" else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    numbers = (vectors[..., real] + 1j * vectors[..., imaginary]) * np.exp(1j * positions * frequencies)
    turned[..., real], turned[..., imaginary] = numbers.real, numbers.imag
    return turned


def frequencies_of(half):
    return THETA ** (-np.arange(half) / half)


@settings(max_examples=60)
@given(
    style=st.sampled_from(["neox", "gptj"]),
    half=st.integers(1, 4),
    rest=st.integers(0, 3),
    positions=st.integers(-5000, 5000),
    seed=st.integers(0, 999),
)
def test_turning_is_complex_multiplication(style, half, rest, positions, seed):
    vectors = np.random.default_rng(seed).standard_normal((3, 2, 2 * half + rest))
    frequencies = frequencies_of(half)
    places = torch.full((3,), positions)
    found = rotary_turn(torch.tensor(vectors), places, torch.tensor(frequencies), style)
    np.testing.assert_allclose(found.numpy(), complex_turn(vectors, positions, frequencies, style), atol=1e-9)
    back = rotary_turn(found, -places, torch.tensor(frequencies), style)
    np.testing.assert_allclose(back.numpy(), vectors, atol=1e-9)
    low = rotary_turn(torch.tensor(vectors).bfloat16(), places, torch.tensor(frequencies), style)
    assert low.dtype == torch.bfloat16


@settings(max_examples=60)
@given(
    style=st.sampled_from(["neox", "gptj"]),
    half=st.integers(1, 4),
    rest=st.sampled_from([0, 2]),
    shifts=st.lists(st.integers(-300, 300), min_size=1, max_size=4),
    ragged=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_shift_serves_keys_computed_at_another_position(style, half, rest, shifts, ragged, seed):
    """Pages hold keys turned for the position `shift` earlier; attention is as if they were in place."""
    random = np.random.default_rng(seed)
    size, block_size, heads = 2 * half + rest, 3, 2
    frequencies = frequencies_of(half)
    keys, values = random.standard_normal((2, len(shifts), block_size, 1, size))
    pages, table, in_place, read = keys.copy(), [], [], []
    position = 400
    for page, shift in enumerate(shifts):
        first, count = (1, 2) if ragged else (0, block_size)
        for token in range(first, first + count):
            raw = keys[page, token]
            pages[page, token] = complex_turn(raw, position - shift, frequencies, style)
            in_place.append(complex_turn(raw, position, frequencies, style))
            read.append(values[page, token])
            position += 1
        table.append(BlockRef(page, 2.0, 0.5, shift=shift, first=first, count=count))
    asked = min(2, len(read))
    raw_query = random.standard_normal((asked, heads, size))
    query = np.stack([complex_turn(row, position - asked + i, frequencies, style) for i, row in enumerate(raw_query)])

    def turn(vectors, positions):
        return rotary_turn(vectors, positions, torch.tensor(frequencies), style)

    found, log_sum = paged_attention(
        torch.tensor(query), [asked], torch.tensor(pages), torch.tensor(values), [table], turn=turn
    )
    expected, expected_sum = dense(query, 2.0 * np.stack(in_place), 0.5 * np.stack(read), size**-0.5)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-8)
    np.testing.assert_allclose(log_sum.numpy(), expected_sum, atol=1e-4)


def page(*shape):
    return torch.zeros(2, 4, *shape)


REFUSED = {
    "query without heads": {"query": torch.zeros(1, 8)},
    "pages without heads": {"keys": torch.zeros(2, 4, 8)},
    "other head size": {"query": torch.zeros(1, 2, 6)},
    "query heads no multiple": {"keys": page(3, 8), "values": page(3, 8)},
    "K and V of different heads": {"values": page(1, 8)},
    "K and V of different pages": {"values": torch.zeros(3, 4, 2, 8)},
    "lengths that do not add up": {"query_lengths": [2]},
    "fewer tables than sequences": {"tables": []},
    "more tables than sequences": {"tables": [[BlockRef(0, count=4)]] * 2},
    "a range beyond the page": {"tables": [[BlockRef(0, first=2, count=3)]]},
    "a range before the page": {"tables": [[BlockRef(0, first=-1, count=2)]]},
    "an empty range": {"tables": [[BlockRef(0, count=0)]]},
    "a page beyond the pool": {"tables": [[BlockRef(2, count=4)]]},
    "a page before the pool": {"tables": [[BlockRef(-1, count=4)]]},
    "a shift without rotary embedding": {"tables": [[BlockRef(0, count=4, shift=3)]]},
    "more queries than tokens": {
        "query": torch.zeros(5, 2, 8), "query_lengths": [5],
    },
    "a sequence without tokens": {"tables": [[]]},
}  # fmt: skip


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(changes):
    fitting = {
        "query": torch.zeros(1, 2, 8),
        "query_lengths": [1],
        "keys": page(2, 8),
        "values": page(2, 8),
        "tables": [[BlockRef(0, count=4)]],
    }
    _, log_sum = paged_attention(**fitting)
    assert float(log_sum[0, 0]) == pytest.approx(math.log(4))
    with pytest.raises(LayoutError):
        paged_attention(**{**fitting, **changes})
