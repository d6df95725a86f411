"""Pages of a prompt in a store: the longest prefix, near-duplicates as references, tenants and models apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jointkv.codec import Bound, Pages, Transform
from jointkv.errors import BadInput, LayoutError, ModelMismatch
from jointkv.store import PageStore, Store, collect, verify
from jointkv.store.folder import TRANSFORMS
from tests.codec.pages import ROTARY, TOKENS, fitted, near, random_pages

TRANSFORM = fitted()
TEXT = list(range(6 * TOKENS + 3))
OTHER_HEADER = [900 + token for token in range(TOKENS)] + TEXT[TOKENS:]
PAGES = random_pages(6)
BOUND = Bound(0.15, 0.25)


def of(store: Store, pages: Pages = PAGES, model: str = "m", tenant: str | None = None, **options: object) -> PageStore:
    return PageStore(store, model, pages.layout, isolation=tenant, bound=BOUND, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [[1.5] * TOKENS, [[1] * TOKENS], ["a"] * TOKENS, "text", None], ids=repr)
def test_tokens_are_whole_numbers_in_a_row(tmp_path: Path, tokens: Any) -> None:
    """Rounded, they found pages of another text."""
    with Store(tmp_path) as store:
        pages = of(store)
        for call in (pages.prefix, pages.load, pages.addresses, lambda tokens: pages.put(tokens, PAGES)):
            with pytest.raises(BadInput, match="tokens: whole numbers in one row"):
                call(tokens)
        assert pages.prefix([]) == 0 and pages.prefix(torch.tensor(TEXT, dtype=torch.int32)) == 0  # type: ignore[arg-type]


def test_pages_need_a_store_and_a_layout(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for given in ((str(tmp_path), PAGES.layout), (store, PAGES)):
            with pytest.raises(BadInput, match=r"PageStore\(Store\(folder\), model, layout\)"):
                PageStore(given[0], "m", given[1])  # type: ignore[arg-type]


def test_a_second_engine_starts_with_the_first_ones_text(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        put = of(store, transform=TRANSFORM).put(TEXT, PAGES)
        assert put.there == 0 and set(put.codecs) == {"alone"} and put.nbytes < 6 * PAGES.layout.page_nbytes
    with Store(tmp_path, write=False) as store:
        pages = of(store)
        assert [pages.prefix(text) for text in (TEXT, [*TEXT[:20], 5, *TEXT[21:]], [7] * 99)] == [6, 2, 0]
        found = pages.load(TEXT)
        errors = PAGES.errors(found)
        assert len(found) == 6 and max(errors.key.max(), errors.value.max()) <= BOUND.block
        assert len(pages.load(TEXT, 2)) == 2 and len(pages.load([7] * 99)) == 0


def test_near_duplicates_are_references_and_differences(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        pages = of(store, transform=TRANSFORM)
        first = pages.put(TEXT, PAGES)
        again = near(PAGES, 0.05)
        put = pages.put(OTHER_HEADER, again)
        assert put.codecs == ("alone", *("reference",) * 5)
        assert put.nbytes < first.nbytes / 2
        third = near(PAGES, 0.3, seed=2)
        assert pages.put([5] * TOKENS + TEXT[TOKENS:], third).codecs == ("alone", *("difference",) * 5)
        assert pages.put(TEXT, PAGES).there == 6
        store.flush()
        for tokens, sent in ((OTHER_HEADER, again), ([5] * TOKENS + TEXT[TOKENS:], third)):
            errors = sent.errors(pages.load(tokens))
            assert max(errors.key.max(), errors.value.max()) <= BOUND.block and errors.token.max() <= BOUND.token
        assert verify(store.segments, store.secret).dangling == 0


def test_headers_that_begin_alike_are_differences(tmp_path: Path) -> None:
    """Another number in the first line: what is alike is referred to; equal first tokens cost nothing."""
    one, two = ([1, 2, 3, 4, number, *TEXT[5:]] for number in (800, 801))
    again, other = near(PAGES, 0.05), random_pages(6, seed=5)
    for side in ("keys", "values"):
        getattr(again, side)[:, 0, :4] = getattr(PAGES, side)[:, 0, :4]
        getattr(again, side)[:, 0, 4] = getattr(other, side)[:, 0, 4]
    with Store(tmp_path) as store:
        pages = of(store, transform=TRANSFORM)
        alone, different = pages.put(one, PAGES), pages.put(two, again)
        assert alone.codecs == ("alone",) * 6 and different.codecs == ("difference", *("reference",) * 5)
        assert different.nbytes < alone.nbytes / 5
        store.flush()
        errors = again.errors(pages.load(two))
        assert max(errors.key.max(), errors.value.max()) <= BOUND.block


def test_pages_of_another_layout_of_bytes_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr("jointkv.store.pages.QUANTISED_FORMAT", 1)
            of(store, transform=TRANSFORM).put(TEXT, PAGES)
        assert of(store).prefix(TEXT) == 0
        assert set(of(store).put(TEXT, PAGES).codecs) == {"alone"}
        assert len(of(store).load(TEXT)) == 6


def test_text_that_moved_by_a_block_is_a_reference(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        pages = of(store, random_pages(1, dtype=torch.float32), transform=TRANSFORM)
        text = random_pages(8, dtype=torch.float32)
        pages.put(list(range(8 * TOKENS)), text)
        from jointkv.codec.turning import moved

        ahead = moved(text, text.positions + TOKENS, TRANSFORM)
        header = random_pages(1, seed=5, dtype=torch.float32)
        sent = Pages(
            torch.cat([header.keys, ahead.keys], 1),
            torch.cat([header.values, ahead.values], 1),
            TOKENS * torch.arange(9),
        )
        put = pages.put([777] * TOKENS + list(range(8 * TOKENS)), sent)
        assert put.codecs[2:] == ("reference",) * 7


def test_tenants_models_layouts_and_bounds_are_apart(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        of(store, tenant="a", transform=TRANSFORM).put(TEXT, PAGES)
        assert of(store, tenant="a").prefix(TEXT) == 6
        assert of(store, tenant="b").prefix(TEXT) == of(store).prefix(TEXT) == 0
        assert of(store, tenant="a", model="n").prefix(TEXT) == 0
        assert of(store, random_pages(1, dtype=torch.float16), tenant="a").prefix(TEXT) == 0
        strict = PageStore(store, "m", PAGES.layout, isolation="a", bound=Bound(0.01, 0.02))
        assert strict.prefix(TEXT) == 0
        put = of(store, tenant="b").put(TEXT, PAGES)
        assert set(put.codecs) == {"alone"}, "a page of another tenant was taken for a reference"


def test_exact_pages(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        exact = PageStore(store, "m", PAGES.layout, bound=Bound(0, 0))
        assert set(exact.put(TEXT, PAGES).codecs) == {"lossless"}
        assert set(exact.put(OTHER_HEADER, PAGES).codecs[1:]) == {"reference"}
        for tokens in (TEXT, OTHER_HEADER):
            assert torch.equal(exact.load(tokens).content, PAGES.content)


def test_a_lost_base_is_a_miss(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        of(store, transform=TRANSFORM).put(TEXT, PAGES)
    with Store(tmp_path) as store:
        of(store).put(OTHER_HEADER, near(PAGES, 0.05))
        for path in store.segments.glob("*.index"):
            for suffix in (".data", ".index"):
                path.with_suffix(suffix).unlink()
        assert len(of(store).load(OTHER_HEADER)) == 1 and len(of(store).load(TEXT)) == 0


def test_a_lost_or_other_transform_is_a_miss(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        of(store, transform=TRANSFORM).put(TEXT, PAGES)
        store.flush()
        (file,) = (tmp_path / TRANSFORMS).iterdir()
        file.write_bytes(b"damaged")
        assert of(store).transform is None and len(of(store).load(TEXT)) == 0
        Transform.fit(random_pages(60, seed=3), ROTARY).save(file)
        assert len(of(store).load(TEXT)) == 0
        TRANSFORM.save(file)
        assert len(of(store).load(TEXT)) == 6


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        pages = of(store, transform=TRANSFORM)
        for wrong in (PAGES.take(torch.arange(5)), random_pages(6, dtype=torch.float16)):
            with pytest.raises(LayoutError, match="6 blocks"):
                pages.put(TEXT, wrong)
        draw = torch.randn(2, 1, TOKENS, 2, 16)
        with pytest.raises(ModelMismatch):
            of(store, Pages(draw, draw, torch.zeros(1, dtype=torch.long)), transform=TRANSFORM)


@pytest.mark.parametrize("bound", [BOUND, Bound(0, 0)], ids=["within a bound", "exact"])
def test_a_base_that_was_computed_again_is_a_miss(tmp_path: Path, bound: Bound) -> None:
    """An address is one of text; with other numbers in its page the differences to it gave others than were put."""

    def pages_of(store: Store) -> PageStore:
        return PageStore(store, "m", PAGES.layout, bound=bound, transform=TRANSFORM)

    sent = PAGES if bound.block == 0 else near(PAGES, 0.1)
    with Store(tmp_path) as store:
        pages_of(store).put(TEXT, PAGES)
    (first,) = store.segments.glob("*.data")
    with Store(tmp_path) as store:
        assert pages_of(store).put(OTHER_HEADER, sent).codecs[1:] == ("reference",) * 5
    for suffix in (".data", ".index"):
        first.with_suffix(suffix).unlink()
    again = near(PAGES, 0.1, seed=9)
    with Store(tmp_path) as store:
        assert pages_of(store).put(TEXT, again).there == 0
        store.flush()
        assert len(pages_of(store).load(TEXT)) == 6
        assert len(pages_of(store).load(OTHER_HEADER)) == 1
        assert verify(store.segments, store.secret).dangling == 5
    assert collect(store.segments, store.secret).dropped == 5
    with Store(tmp_path) as store:
        assert verify(store.segments, store.secret).dangling == 0
        assert pages_of(store).put(OTHER_HEADER, again).there == 1
        assert len(pages_of(store).load(TEXT)) == len(pages_of(store).load(OTHER_HEADER)) == 6


def test_of_two_pages_at_one_address_differences_stand_on_theirs(tmp_path: Path) -> None:
    """Two processes may compute and write one text at once."""
    again = near(PAGES, 0.14, seed=9)
    with Store(tmp_path) as one, Store(tmp_path) as other:
        for store, pages in ((one, PAGES), (other, again)):
            of(store, transform=TRANSFORM).put(TEXT, pages)
            third = [5 if store is one else 6] * TOKENS + TEXT[TOKENS:]
            assert set(of(store).put(third, near(pages, 0.05)).codecs[1:]) == {"reference"}
    with Store(tmp_path) as store:
        for number, pages in ((5, PAGES), (6, again)):
            found = of(store).load([number] * TOKENS + TEXT[TOKENS:])
            errors = near(pages, 0.05).take(slice(0, len(found))).errors(found)
            assert max(errors.key.max(), errors.value.max()) <= BOUND.block
    collect(store.segments, store.secret)
    assert verify(store.segments, store.secret).dangling == 0
