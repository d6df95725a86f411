"""Every codec: what comes back, how many bytes it takes, and what it says of bytes that are not its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jointkv.attention.rotary import Rotary
from jointkv.codec import CODECS, Aids, Layout, Pages, Transform, decode, encode, get_codec
from jointkv.codec.difference import nearer
from jointkv.codec.packing import pack_floats, pack_integers, unpack_floats, unpack_integers
from jointkv.codec.turning import moved
from jointkv.errors import BadInput, LayoutError, ModelMismatch
from tests.codec.pages import ROTARY, TOKENS, fitted, near, random_pages

TRANSFORM = fitted()
WORST = {"fp8": 0.04, "int4": 0.12, "alone": 0.2, "difference": 0.12, "reference": 0.2}
"""Relative error of K and V of the random pages; the others are exact."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(CODECS.keys() - {"int4"}))  # which is for other heads, below
def test_what_is_encoded_comes_back(name: str, dtype: torch.dtype) -> None:
    pages = random_pages(5, dtype=dtype)
    aids = Aids(TRANSFORM, near(pages, 0.1))
    before = pages.content.clone()
    messages = encode(get_codec(name), pages, aids)
    found = decode(messages, pages.layout, pages.positions, aids)
    assert torch.equal(pages.content, before)
    errors = pages.errors(found)
    assert found.layout == pages.layout and torch.equal(found.positions, pages.positions)
    assert max(error.max() for error in errors[:2]) <= WORST.get(name, 0.0)
    if get_codec(name).lossless:
        assert torch.equal(found.content, pages.content)
    if name != "raw":
        assert all(len(message) < pages.layout.page_nbytes for message in messages)


def test_four_bits() -> None:
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 8, 2, 32, generator=draw).bfloat16() for _ in range(2))
    pages = Pages(keys, values, torch.arange(3) * 8)
    messages = encode(get_codec("int4"), pages, Aids())
    found = decode(messages, pages.layout, pages.positions, Aids())
    assert max(error.max() for error in pages.errors(found)[:2]) < WORST["int4"]
    assert len(messages[0]) < pages.layout.page_nbytes * (4.1 + 32 / 8) / 16
    with pytest.raises(LayoutError, match="32"):
        encode(get_codec("int4"), random_pages(1), Aids())


def test_pages_that_moved_are_references() -> None:
    """The same numbers behind other positions: only the keys are turned, and nothing is left to say."""
    pages, shift = random_pages(3, dtype=torch.float32, first=64), torch.tensor([-64, 5, 1000])
    elsewhere = moved(pages, pages.positions + shift, TRANSFORM)
    assert elsewhere.errors(moved(pages, elsewhere.positions, TRANSFORM)).key.max() < 1e-5
    assert elsewhere.errors(Pages(pages.keys, pages.values, elsewhere.positions)).key.max() > 0.3
    aids = Aids(TRANSFORM, pages)
    messages = encode(get_codec("difference"), elsewhere, aids)
    found = decode(messages, pages.layout, elsewhere.positions, aids)
    assert elsewhere.errors(found).key.max() < 1e-5
    # All but the page with the first four tokens of a text.
    assert max(map(len, messages[1:])) < pages.layout.page_nbytes / 50


def test_first_tokens_of_a_text_are_kept_as_they_are() -> None:
    pages = random_pages(2)
    found = decode(encode(get_codec("alone"), pages, Aids(TRANSFORM)), pages.layout, pages.positions, Aids(TRANSFORM))
    assert torch.equal(found.keys[:, 0, :4], pages.keys[:, 0, :4])
    assert torch.equal(found.values[:, 0, :4], pages.values[:, 0, :4])
    assert not torch.equal(found.keys[:, 0, 4:], pages.keys[:, 0, 4:])


def test_finer_levels_are_nearer_and_longer() -> None:
    pages = random_pages(4, first=64)
    errors, sizes = [], []
    for level in (4, 12, 20, 28):
        messages = encode(get_codec("alone"), pages, Aids(TRANSFORM, level=level))
        found = decode(messages, pages.layout, pages.positions, Aids(TRANSFORM))
        errors.append(float(pages.errors(found).value.max()))
        sizes.append(sum(map(len, messages)))
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)
    assert errors[-1] < 0.03


def test_codecs_mix_in_one_call() -> None:
    pages = random_pages(4)
    aids = Aids(TRANSFORM, near(pages, 0.05))
    names = ("raw", "difference", "alone", "lossless")
    messages = [encode(get_codec(name), pages, aids)[number] for number, name in enumerate(names)]
    found = decode(messages, pages.layout, pages.positions, aids)
    for number, name in enumerate(names):
        alone = decode(encode(get_codec(name), pages, aids), pages.layout, pages.positions, aids)
        assert torch.equal(found.keys[:, number], alone.keys[:, number])


@pytest.mark.parametrize(
    "numbers", [[0] * 9, [1, -1, 0], [2, -1] * 40, [3], [-7, 7, 2], [127, -128], [300, -32767], []]
)
def test_whole_numbers(numbers: list[int]) -> None:
    array = torch.tensor(numbers, dtype=torch.int16).numpy()[:, None]
    for bands in ([len(array)], [len(array) // 2, 0, len(array) - len(array) // 2]):
        found = np.empty_like(array)
        rest = unpack_integers(memoryview(pack_integers(array, bands) + b"tail"), found, bands)
        assert found[:, 0].tolist() == numbers and bytes(rest) == b"tail"


def test_numbers_that_are_near_0_take_what_they_say() -> None:
    """No repetitions are found where there are none, and frequent numbers are short."""
    draw = np.random.default_rng(0)
    for spread, over in ((0.3, 1.15), (1.0, 1.05), (4.0, 1.03)):
        numbers = np.round(draw.normal(0, spread, (50, 1000))).astype(np.int16)
        share = np.unique(numbers, return_counts=True)[1] / numbers.size
        entropy = float(-(share * np.log2(share)).sum())
        assert 8 * len(pack_integers(numbers, [len(numbers)])) / numbers.size < over * entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_of_every_kind(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0.0, -0.0, 1.5, -3.25, float("inf"), float("nan"), 1e-7, 6e4], dtype=dtype)
    data = numbers.view(torch.uint8).numpy()
    assert (unpack_floats(pack_floats(data, dtype.itemsize), len(data), dtype.itemsize) == data).all()


def test_what_is_missing_is_named() -> None:
    pages = random_pages(2)
    for name in ("alone", "difference"):
        with pytest.raises(BadInput, match="transform"):
            encode(get_codec(name), pages, Aids())
    with pytest.raises(BadInput, match="reference"):
        decode([bytes([3])] * 2, pages.layout, pages.positions, Aids(TRANSFORM))
    with pytest.raises(BadInput, match="newer"):
        decode([b"\xff"], pages.layout, pages.positions[:1], Aids())
    with pytest.raises(BadInput, match="there are raw"):
        get_codec("nothing")


def test_another_models_transform_is_refused() -> None:
    pages = random_pages(2)
    other = Transform.fit(random_pages(60, seed=3), ROTARY)
    messages = encode(get_codec("alone"), pages, Aids(TRANSFORM))
    with pytest.raises(ModelMismatch, match="another transform"):
        decode(messages, pages.layout, pages.positions, Aids(other))
    larger = Pages(pages.keys.repeat(1, 1, 1, 2, 1), pages.values.repeat(1, 1, 1, 2, 1), pages.positions)
    with pytest.raises(ModelMismatch):
        encode(get_codec("alone"), larger, Aids(TRANSFORM))


def test_transforms_are_saved(tmp_path: Path) -> None:
    TRANSFORM.save(tmp_path / "t")
    found = Transform.load(tmp_path / "t")
    assert found.identity == TRANSFORM.identity and found.rotary[0].interleaved is False
    (tmp_path / "other").write_bytes(b"x")
    for name in ("other", "none"):
        with pytest.raises(BadInput, match="not a transform"):
            Transform.load(tmp_path / name)


def test_a_model_that_turns_nothing() -> None:
    still = [Rotary(torch.zeros(0, dtype=torch.float64), False)] * 3
    pages = random_pages(60, dtype=torch.float32)
    transform = Transform.fit(pages, still)
    chosen = pages.take(torch.arange(4))
    found = decode(
        encode(get_codec("alone"), chosen, Aids(transform)), chosen.layout, chosen.positions, Aids(transform)
    )
    assert chosen.errors(found).key.max() < 0.2


def test_layouts_have_fingerprints() -> None:
    layout = random_pages(1).layout
    assert layout == Layout(3, TOKENS, 2, 16, 16, torch.bfloat16)
    others = [random_pages(1, dtype=torch.float16).layout, Layout(3, TOKENS, 4, 8, 8, torch.bfloat16)]
    assert len({layout.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_a_difference_takes_the_mean_for_tokens_that_are_other_ones() -> None:
    """A header with another number in it: what is alike is referred to, and the rest costs what it costs alone."""
    pages, other = random_pages(1), random_pages(1, seed=5)
    changed = Pages(pages.keys.clone(), pages.values.clone(), pages.positions)
    changed.keys[:, :, 4:6], changed.values[:, :, 4:6] = other.keys[:, :, 4:6], other.values[:, :, 4:6]
    aids = Aids(TRANSFORM, pages)
    assert nearer(changed, pages, TRANSFORM).tolist() == [[True] * 4 + [False] * 2 + [True] * 2]
    (message,) = encode(get_codec("difference"), changed, aids)
    found = decode([message], pages.layout, pages.positions, aids)
    assert max(changed.errors(found)[:2]) < 0.2
    assert torch.equal(found.keys[:, 0, :4], changed.keys[:, 0, :4])
    (alone,) = encode(get_codec("alone"), changed, aids)
    assert len(message) < len(alone) / 2, "the first tokens are equal and cost nothing"
    with pytest.raises(BadInput, match="too early"):
        decode([message[:10]], pages.layout, pages.positions, aids)
