"""Pages to a store and back, whatever the order of the numbers in a page; without an engine."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from jointkv.store import Store, known
from jointkv.store.names import Names
from jointkv.vllm_plugin.messages import Load, Save
from jointkv.vllm_plugin.worker import loads, stored
from jointkv.vllm_plugin.worker.stored import StoredPages
from tests.store.hanging import HangingDisk
from tests.vllm_plugin.worker.test_filler import TOKENS, Place

NAMED = Names(bytes(32), "a model").of(range(6 * TOKENS), TOKENS)
SAVED, LOADED = np.array([3, 9, 4, 1, 20, 11]), np.array([5, 6, 7, 8, 10, 12])
SAVE = Save(SAVED, NAMED, TOKENS * np.arange(6))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def place(request: pytest.FixtureRequest) -> Place:
    return Place(request.param)


@pytest.fixture
def pages(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoredPages]:
    monkeypatch.setattr(stored, "AT_A_TIME", 4)
    made = StoredPages(Store(tmp_path / "pages"), place.filler.pages, place.order, lambda: b"weights")
    yield made
    made.close()


def loaded(pages: StoredPages, addresses: list[bytes] | None = None) -> set[int]:
    """The pages that could not be filled."""
    wanted = [name.address for name in NAMED] if addresses is None else addresses
    pages.load(Load("request", LOADED, wanted))
    while not (done := pages.finished()):
        pass
    assert done == {"request"} and pages.finished() == set()
    lost = pages.lost()
    assert pages.lost() == set()
    return lost


def test_every_bit_comes_back(place: Place, pages: StoredPages) -> None:
    before = [layer.clone() for layer in place.filler.pages.layers]
    pages.save(SAVE)
    for layer in place.filler.pages.layers:
        layer[SAVED] = 0  # it was copied
    pages._writing.submit(int).result()
    assert loaded(pages) == set()
    for layer, was in zip(place.filler.pages.layers, before, strict=True):
        assert torch.equal(layer[LOADED], was[SAVED]), "in order"
        others = np.setdiff1d(np.arange(len(layer)), [*LOADED, *SAVED])
        assert torch.equal(layer[others], was[others])
    assert pages.counts["store_pages_written"] == pages.counts["store_pages_read"] == 6


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness of their own")
def test_its_threads_give_way_to_those_of_the_model(pages: StoredPages) -> None:
    """Beside busy threads of equal rank a step once took fifty times as long."""

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert pages._writing.submit(niceness).result() == min(19, niceness() + 19)
    assert pages._reading.submit(niceness).result() == min(19, niceness() + 10)


def test_what_is_missing_and_all_behind_it_is_lost(place: Place, pages: StoredPages) -> None:
    pages.save(SAVE)
    pages._writing.submit(int).result()
    before = [layer[LOADED[5]].clone() for layer in place.filler.pages.layers]
    known = [name.address for name in NAMED]
    assert loaded(pages, [*known[:5], bytes(32)]) == {12}
    assert all(torch.equal(layer[12], was) for layer, was in zip(place.filler.pages.layers, before, strict=True))
    assert loaded(pages, [bytes(32), *known[1:]]) == set(LOADED.tolist())
    assert loaded(pages, known[:4]) == {10, 12} and loaded(pages, []) == set(LOADED.tolist())
    assert pages.counts["store_faults"] == 0


def test_other_weights_end_it_and_loads_are_answered_all_the_same(place: Place, tmp_path: Path) -> None:
    weights = [b"first"]
    pages = StoredPages(Store(tmp_path / "pages"), place.filler.pages, place.order, lambda: weights[0])
    pages.check_weights()
    assert not pages.off
    pages.save(SAVE)
    pages._writing.submit(int).result()
    weights[0] = b"second"
    pages.check_weights()
    pages.check_weights()
    assert pages.off and pages.counts["store_faults"] == 1
    assert loaded(pages) == set(LOADED.tolist())
    pages.close()


def test_a_load_that_hangs_is_given_up_and_writes_nothing_after(
    place: Place, pages: StoredPages, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.save(SAVE)
    pages._writing.submit(int).result()
    disk, wanted = HangingDisk(), [name.address for name in NAMED]
    monkeypatch.setattr(known, "os", disk)
    before = [layer.clone() for layer in place.filler.pages.layers]
    pages.load(Load("first", LOADED, wanted))
    pages.load(Load("behind it", SAVED[:2], wanted[:2]))
    assert disk.reading.wait(60) and pages.finished() == set()
    with monkeypatch.context() as patch:
        patch.setattr(loads, "HANGS_S", 0.0)
        assert pages.finished() == {"first", "behind it"}
    assert pages.lost() == {*LOADED.tolist(), *SAVED[:2].tolist()}
    pages.load(Load("while it hangs", LOADED[:1], wanted[:1]))
    assert pages.finished() == {"while it hangs"} and pages.lost() == {LOADED[0]}
    disk.answers.set()
    pages._reading.submit(int).result()
    assert pages.finished() == set() and pages.counts["store_pages_lost"] == 9
    assert all(torch.equal(layer, was) for layer, was in zip(place.filler.pages.layers, before, strict=True))
    assert loaded(pages) == set(), "it answers again"
    assert not pages.off and pages.counts["store_faults"] == 0


def test_what_was_read_before_the_disk_hung_is_kept(
    place: Place, pages: StoredPages, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.save(SAVE)
    pages._writing.submit(int).result()
    disk, get = HangingDisk(), pages._store.get
    asked: list[int] = []

    def hangs_later(addresses: list[bytes]) -> object:
        asked.append(len(addresses))
        if len(asked) > 1:
            monkeypatch.setattr(known, "os", disk)
        return get(addresses)

    monkeypatch.setattr(pages._store, "get", hangs_later)
    pages.load(Load("request", LOADED, [name.address for name in NAMED]))
    assert disk.reading.wait(60)
    with monkeypatch.context() as patch:
        patch.setattr(loads, "HANGS_S", 0.0)
        assert pages.finished() == {"request"}
    assert pages.lost() == {10, 12} and pages.counts["store_pages_read"] == 4
    disk.answers.set()


def test_a_store_that_hangs_does_not_keep_the_engine_from_ending(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages, disk = StoredPages(Store(tmp_path / "pages"), place.filler.pages, place.order, lambda: b""), HangingDisk()
    pages.save(SAVE)
    pages._writing.submit(int).result()
    monkeypatch.setattr(known, "os", disk)
    monkeypatch.setattr(stored, "STOP_S", 0.01)
    pages.load(Load("request", LOADED, [name.address for name in NAMED]))
    assert disk.reading.wait(60)
    pages.close()
    assert pages.off and not disk.answers.is_set()
    disk.answers.set()
