"""The bound is kept by what the receiver decodes, and the codec is the smallest that keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.codec import Aids, Bound, Chooser, Layout, Pages, decode, encode, get_codec
from jointkv.codec.base import LEVELS
from jointkv.errors import BadInput, LayoutError
from tests.codec.pages import fitted, near, random_pages

TRANSFORM = fitted()


def errors_of(chooser: Chooser, pages: Pages, references: Pages | None = None) -> torch.Tensor:
    encoded = chooser.encode(pages, references)
    found = decode(encoded.messages, pages.layout, pages.positions, Aids(TRANSFORM, references))
    assert torch.equal(found.content, encoded.decoded.content)
    return torch.stack(list(pages.errors(found))).amax(1)


@pytest.mark.parametrize("bound", [-0.1, 1, float("nan"), "0.1", None, True], ids=repr)
def test_bounds_are_numbers_below_1(bound: Any) -> None:
    for options in ({"block": bound}, {"token": bound}):
        with pytest.raises(BadInput, match="bounds of a page are at least 0 and below 1"):
            Bound(**options)


@pytest.mark.parametrize("name", ["zip", None, ["raw"]], ids=repr)
def test_an_unknown_codec_names_those_there_are(name: Any) -> None:
    with pytest.raises(BadInput, match="there are raw, lossless"):
        get_codec(name)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Aids(level=LEVELS),
        lambda: Aids(level=-1),
        lambda: Aids(TRANSFORM, level="fine"),  # type: ignore[arg-type]
        lambda: Aids("transform"),  # type: ignore[arg-type]
        lambda: Aids(TRANSFORM, TRANSFORM),  # type: ignore[arg-type]
        lambda: Chooser(Bound(), TRANSFORM, LEVELS),
        lambda: Chooser(0.2),  # type: ignore[arg-type]
        lambda: Chooser(Bound(), "transform"),  # type: ignore[arg-type]
        lambda: encode(get_codec("raw"), None, Aids()),  # type: ignore[arg-type]
        lambda: decode([b"x"], random_pages(1).layout, random_pages(2).positions, Aids()),
        lambda: decode(None, random_pages(1).layout, random_pages(1).positions, Aids()),  # type: ignore[arg-type]
        lambda: decode([b"x"], random_pages(1).layout, [0], Aids()),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_page_bound_or_level(call: Callable[[], object]) -> None:
    """Pages that were encoded at a level that there is not could not be read again."""
    with pytest.raises(BadInput, match=r"level|bound|needed|encoded"):
        call()


@pytest.mark.parametrize("changed", [{"block_size": -1}, {"heads": "2"}, {"key_size": 1.5}, {"dtype": "bfloat16"}])
def test_layouts_are_made_of_whole_numbers_and_a_dtype(changed: dict[str, Any]) -> None:
    layout = random_pages(1).layout
    with pytest.raises(LayoutError, match=r"whole number|not supported"):
        Layout(**{**vars(layout), **changed})
    with pytest.raises(LayoutError, match="tensors"):
        Pages([1], [2], [3])  # type: ignore[arg-type]


@settings(max_examples=25)
@given(
    block=st.sampled_from([0.0, 0.003, 0.03, 0.1, 0.3]),
    noise=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    level=st.integers(0, 39),
    seed=st.integers(0, 5),
)
def test_every_page_is_within_its_bound(block: float, noise: float, level: int, seed: int) -> None:
    bound = Bound(block, min(1.5 * block, 0.9))
    pages = random_pages(3, seed=seed)
    key, value, token = errors_of(Chooser(bound, TRANSFORM, level), pages, near(pages, noise))
    assert key <= bound.block and value <= bound.block and token <= bound.token


def test_the_smallest_that_is_within() -> None:
    pages = random_pages(4, first=64)
    chooser = Chooser(Bound(0.15, 0.25), TRANSFORM)
    assert set(chooser.encode(pages).codecs) == {"alone"}
    assert set(chooser.encode(pages, near(pages, 0.05)).codecs) == {"reference"}
    assert set(chooser.encode(pages, near(pages, 0.3)).codecs) == {"difference"}
    assert set(chooser.encode(pages, random_pages(4, seed=7, first=64)).codecs) == {"alone"}
    assert set(Chooser(Bound(0, 0), TRANSFORM).encode(pages, pages).codecs) == {"reference"}
    assert set(Chooser(Bound(0, 0), TRANSFORM).encode(pages, near(pages, 0.05)).codecs) == {"lossless"}
    assert set(Chooser(Bound()).encode(pages).codecs) == {"lossless"}
    chosen = chooser.encode(pages, near(pages, 0.05), torch.tensor([True, False, True, False]))
    assert chosen.codecs == ["reference", "alone", "reference", "alone"]


def test_without_a_transform_only_text_in_its_place_is_a_reference() -> None:
    pages = random_pages(3)
    moved = Pages(pages.keys, pages.values, pages.positions + torch.tensor([0, 8, 0]))
    encoded = Chooser(Bound(0, 0)).encode(moved, pages)
    assert encoded.codecs == ["reference", "lossless", "reference"]
    found = decode(encoded.messages, pages.layout, moved.positions, Aids(None, pages))
    assert torch.equal(found.content, moved.content)


def test_equal_means_every_bit() -> None:
    pages = random_pages(2)
    pages.values[0, 1, 2, 0, 3] = 0.0
    other = Pages(pages.keys, pages.values.clone(), pages.positions)
    other.values[0, 1, 2, 0, 3] = -0.0
    assert Chooser(Bound(0, 0), TRANSFORM).encode(pages, other).codecs == ["reference", "lossless"]


def test_steps_are_as_coarse_as_the_bound_allows() -> None:
    """Of all levels within it a page takes one of the two coarsest, however far off the first try was."""
    pages = random_pages(4, first=64)
    for block in (0.03, 0.06, 0.12):
        chosen = [message[1] for message in Chooser(Bound(block, 0.9), TRANSFORM, 6).encode(pages).messages]
        for number, level in enumerate(chosen):
            page = pages.take(torch.tensor([number]))
            errors = errors_of(Chooser(Bound(0.99, 0.99), TRANSFORM, level - 2), page)
            assert max(errors[:2]) > block * 0.99


def test_numbers_that_are_none_are_kept_exactly() -> None:
    pages = random_pages(3)
    pages.keys[0, 1, 2, 0, 3], pages.values[2, 2, 0, 1, 1] = float("nan"), float("inf")
    encoded = Chooser(Bound(), TRANSFORM).encode(pages)
    assert encoded.codecs == ["alone", "lossless", "lossless"]
    found = decode(encoded.messages, pages.layout, pages.positions, Aids(TRANSFORM))
    assert torch.equal(found.content[1:], pages.content[1:])


def test_one_token_that_is_far_off_makes_its_page_finer() -> None:
    pages = random_pages(2, first=64)
    pages.values[:, 0, 3] *= 1e-3  # its error is the step's, which is large beside it
    assert errors_of(Chooser(Bound(0.2, 0.3), TRANSFORM), pages)[2] <= 0.3
    plain, one = (len(message) for message in Chooser(Bound(0.2, 0.3), TRANSFORM).encode(pages).messages[::-1])
    assert one > plain


def test_nothing_at_all() -> None:
    pages = random_pages(2).take(torch.zeros(0, dtype=torch.long))
    assert Chooser(Bound(), TRANSFORM).encode(pages).messages == []
    assert len(decode([], pages.layout, pages.positions, Aids())) == 0


@pytest.mark.parametrize("bound", [(-0.1, 0.3), (0.2, 1.0), (float("nan"), 0.2)])
def test_bounds_that_make_no_sense(bound: tuple[float, float]) -> None:
    with pytest.raises(BadInput, match="at least 0"):
        Bound(*bound)
    with pytest.raises(BadInput, match="level"):
        Chooser(Bound(), None, 40)
