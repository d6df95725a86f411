"""`PagedKV` refuses layouts it does not know; relative errors are what their definition says, in float64."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.core import blocks
from jointkv.core.blocks import PagedKV, served_errors
from jointkv.errors import LayoutError
from tests.core.shadow import naive_error, naive_token_error

TOKENS, HEADS = 2, 2
ROUNDING = 1e-5


def layer(pages=3, tokens=TOKENS, heads=HEADS, size=4, dtype=torch.float32):
    return torch.ones(pages, tokens, heads, size, dtype=dtype)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ([], []),
        ([layer()], []),
        ([layer(), layer()], [layer()]),
        ([layer()[0]], [layer()[0]]),
        ([layer()], [layer().flatten(2)]),
        ([layer(dtype=torch.float64)], [layer(dtype=torch.float64)]),
        ([layer(dtype=torch.long)], [layer(dtype=torch.long)]),
        ([layer()], [layer(dtype=torch.bfloat16)]),
        ([layer(), layer(dtype=torch.float16)], [layer(), layer(dtype=torch.float16)]),
        ([layer(), layer(size=8)], [layer(), layer()]),
        ([layer(), layer()], [layer(), layer(size=8)]),
        ([layer()], [layer(pages=4)]),
        ([layer()], [layer(tokens=3)]),
        ([layer()], [layer(heads=1)]),
    ],
)
def test_other_layouts_are_refused(keys, values):
    with pytest.raises(LayoutError):
        PagedKV(keys, values)


def test_sizes_count_every_layer_and_both_sides():
    kv = PagedKV([layer(dtype=torch.bfloat16)] * 3, [layer(size=6, dtype=torch.bfloat16)] * 3)
    assert (kv.num_layers, kv.num_pages, kv.block_size) == (3, 3, TOKENS)
    assert kv.page_nbytes == 3 * 2 * TOKENS * HEADS * (4 + 6)


def test_vectors_are_the_pages_asked_for_in_order():
    keys = torch.arange(5 * 2 * 1 * 3).view(5, 2, 1, 3).to(torch.float16)
    kv = PagedKV([keys, keys + 1], [keys + 2, keys + 3])
    index = torch.tensor([4, 0, 2, 2])
    for side, vectors in enumerate(kv.vectors(index)):
        assert vectors.dtype == torch.float32
        for shift in (0, 1):
            assert torch.equal(vectors[shift], (keys + shift + 2 * side).flatten(1)[index].float())


def test_batches_cover_every_block_once_whatever_their_size(monkeypatch):
    kv = PagedKV([layer()] * 2, [layer()] * 2)
    for bytes_at_a_time in (1, 200, 1 << 20):
        monkeypatch.setattr(blocks, "VECTORS_BYTES", bytes_at_a_time)
        assert [i for part in kv.batches(7) for i in range(7)[part]] == list(range(7))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    layers=st.integers(1, 4),
    pages=st.integers(1, 6),
    aggregate=st.sampled_from(["rms", "max"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scaled=st.booleans(),
    zeros=st.booleans(),
    bytes_at_a_time=st.sampled_from([1, 200, 1 << 20]),
)
def test_served_errors_are_the_definition(seed, layers, pages, aggregate, dtype, scaled, zeros, bytes_at_a_time):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    sides = [[random(pages, TOKENS, HEADS, size).to(dtype) for _ in range(layers)] for size in (4, 3)]
    if zeros:
        for side in sides:
            for tensor in side:
                tensor[torch.rand(pages, generator=generator) < 0.4] = 0
    own, served_by = torch.randint(pages, (2, 7), generator=generator)
    scales = [random(layers, 7) if scaled else None for _ in sides]
    with mock.patch.object(blocks, "VECTORS_BYTES", bytes_at_a_time):
        found = served_errors(PagedKV(*sides), own, served_by, aggregate, *scales)
    token_errors = np.zeros(7)
    for side, scale, errors in zip(sides, scales, (found.key, found.value), strict=True):
        vectors = torch.stack([tensor.flatten(1) for tensor in side])
        read = vectors[:, served_by]
        if scale is not None:
            read = (read.float() * scale[:, :, None]).to(dtype)
        written, read = vectors.double().numpy(), read.double().numpy()
        pairs = [(written[:, own[i]], read[:, i]) for i in range(7)]
        expected = [naive_error(*pair, aggregate) for pair in pairs]
        worst = [naive_token_error(*pair, TOKENS, aggregate) for pair in pairs]
        token_errors = np.maximum(token_errors, worst)
        np.testing.assert_allclose(errors.numpy(), expected, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(found.token.numpy(), token_errors, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_array_equal(found.take(own > 0).token, found.token[own > 0])


def test_no_blocks_have_no_errors():
    none = torch.zeros(0, dtype=torch.long)
    errors = served_errors(PagedKV([layer()], [layer()]), none, none, "rms")
    assert [error.shape for error in errors] == [(0,)] * 3


def test_a_zero_block_is_served_by_a_zero_block_only():
    keys = torch.stack((torch.zeros(2, 1, 2), torch.zeros(2, 1, 2), torch.ones(2, 1, 2)))
    kv = PagedKV([keys], [keys])
    errors = served_errors(kv, torch.tensor([0, 0, 2]), torch.tensor([1, 2, 0]), "rms")
    assert [error.tolist() for error in errors] == [[0.0, np.inf, 1.0]] * 3


def test_blocks_that_are_no_numbers_have_no_finite_error():
    keys = layer()
    keys[0, 0, 0, 0] = torch.nan
    keys[1, 0, 0, 0] = torch.inf
    errors = served_errors(PagedKV([keys], [layer()]), torch.tensor([0, 1, 2, 2]), torch.tensor([2, 2, 0, 1]), "max")
    assert not errors.key.isfinite().any()


def test_tiny_blocks_do_not_pass_for_equal_because_their_squares_vanish():
    keys = torch.stack((torch.full((2, 1, 2), 1e-25), torch.full((2, 1, 2), -1e-25)))
    errors = served_errors(PagedKV([keys], [keys]), torch.tensor([0]), torch.tensor([1]), "rms")
    assert not errors.key[0] < 2 - ROUNDING  # the truth is 2; "not a number" would do as well


def test_a_norm_too_large_for_float32_is_never_within_a_bound():
    """inf in the denominator would make any finite difference look like none."""
    keys = torch.full((2, 4, 1, 8), 2e19)
    keys[1] *= -0.1
    kv = PagedKV([keys], [torch.ones(2, 4, 1, 8)])
    errors = served_errors(kv, torch.tensor([0]), torch.tensor([1]), "rms")
    assert errors.key.item() == torch.inf
