"""Stores with flipped bits, cut and spliced files; pages that are damaged before they are decoded."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jointkv.codec import CODECS, Aids, Bound, Pages, decode, encode
from jointkv.store import PageStore, Store, verify
from tests.codec.pages import TOKENS, fitted, near, random_pages
from tests.effort import fuzz_settings
from tests.fuzz.damage import PROMISE, damaged_bytes, promise

TEXT = list(range(3 * TOKENS))
PROMPTS = (TEXT, [900] * TOKENS + TEXT[TOKENS:])
PAGES = random_pages(3)
TRANSFORM = fitted()


def opened(store: Store) -> PageStore:
    return PageStore(store, "m", PAGES.layout, isolation="a", bound=Bound(0.15, 0.25))


@cache
def sound(folder: Path) -> tuple[dict[Path, bytes], list[Pages]]:
    """Every file of a store with two segments, one of them as its writer died, and what it holds."""
    with Store(folder) as store:
        pages = PageStore(store, "m", PAGES.layout, isolation="a", bound=Bound(0.15, 0.25), transform=TRANSFORM)
        pages.put(PROMPTS[0], PAGES)
    dead = Store(folder)
    opened(dead).put(PROMPTS[1], near(PAGES, 0.05))
    dead.flush()
    dead._give_up()
    with Store(folder, write=False) as store:
        held = [opened(store).load(prompt) for prompt in PROMPTS]
    assert [len(pages) for pages in held] == [3, 3]
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}, held


@pytest.mark.hazard("Parsers", "a store of pages with damaged files", "a named error or a miss, never a wrong page")
@fuzz_settings()
@given(data=st.data())
def test_stores(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    files, held = sound(stored(tmp_path_factory))
    path = data.draw(st.sampled_from(sorted(files)))
    whole = files[path]
    if data.draw(st.booleans()):
        made = bytearray(whole)
        for at in data.draw(st.lists(st.integers(0, 8 * len(whole) - 1), min_size=1, max_size=3)):
            made[at // 8] ^= 1 << at % 8
        damaged = bytes(made)
    else:
        damaged = data.draw(damaged_bytes(whole))
    try:
        path.write_bytes(damaged)
        with promise(), Store(folder_of(files), write=False) as store:
            pages = opened(store)
            for prompt, expected in zip(PROMPTS, held, strict=True):
                found = pages.load(prompt)
                assert torch.equal(found.content, expected.content[: len(found)]), "a wrong page"
            verify(store.segments, store.secret)
    finally:
        path.write_bytes(whole)


STORED: list[Path] = []


def stored(factory: pytest.TempPathFactory) -> Path:
    if not STORED:
        STORED.append(factory.mktemp("store"))
    return STORED[0]


def folder_of(files: dict[Path, bytes]) -> Path:
    return next(path.parent for path in files if path.name == "store.json")


@cache
def messages(name: str) -> list[bytes]:
    return encode(CODECS[name], PAGES, Aids(TRANSFORM, near(PAGES, 0.3)))


@pytest.mark.hazard("Parsers", "a damaged page of any codec", PROMISE)
@fuzz_settings()
@given(name=st.sampled_from(sorted(CODECS.keys() - {"int4"})), number=st.integers(0, 2), data=st.data())
def test_pages(name: str, number: int, data: st.DataObject) -> None:
    damaged = data.draw(damaged_bytes(messages(name)[number]))
    position = PAGES.positions[number : number + 1]
    with promise():
        found = decode([damaged], PAGES.layout, position, Aids(TRANSFORM, PAGES.take(torch.tensor([number]))))
        assert found.layout == PAGES.layout and len(found) == 1
