"""A store finds what was put, after restarts, beside other writers, and says what is wrong with a folder."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from jointkv.errors import BadInput, StoreError
from jointkv.store import Names, Store, collect, list_segments, verify
from jointkv.store.folder import ABOUT, SECRET
from jointkv.store.segments import DATA, JOURNAL, TABLE
from tests.store.records import address, record


def fill(folder: Path, numbers: range, **options: int) -> None:
    with Store(folder, **options) as store:  # type: ignore[arg-type]
        store.put(record(number) for number in numbers)


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted((folder / "segments").glob(f"*{suffix}"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_bytes": 0}, "max_bytes: 0 is not a whole number"),
        ({"max_bytes": "1 GB"}, "max_bytes: '1 GB'"),
        ({"max_bytes": 1.5}, "max_bytes: 1.5"),
        ({"segment_bytes": -1}, "segment_bytes: -1"),
        ({"segment_bytes": "x"}, "segment_bytes: 'x'"),
        ({"secret": b"short"}, "has 32 bytes"),
        ({"secret": "x" * 32}, "has 32 bytes"),
        ({"secret": 3}, "has 32 bytes"),
    ],
)
def test_options_that_make_no_sense_make_no_folder(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Store(tmp_path / "store", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [None, 3, ["a"], b"a"], ids=repr)
def test_what_names_no_folder(folder: Any) -> None:
    with pytest.raises(BadInput, match="a store is a folder"):
        Store(folder)


def test_what_was_put_is_found_at_once_and_after_a_restart(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert store.put([record(1), record(2), record(1)]) == 2
        assert store.get([address(2), address(3)]) == [record(2), None]
        store.flush()
        assert store.put([record(2), record(3)]) == 1
        assert store.has([address(number) for number in range(5)]) == [False, True, True, True, False]
        assert store.with_texts([record(3).text, bytes(16)]) == [record(3), None]
    for write in (True, False):
        with Store(tmp_path, write=write) as store:
            assert store.get([address(number) for number in (1, 2, 3, 4)]) == [*map(record, (1, 2, 3)), None]
            assert store.with_texts([record(2).text]) == [record(2)]
    assert len(files(tmp_path, DATA)) == len(files(tmp_path, TABLE)) == 1 and not files(tmp_path, JOURNAL)


def test_writers_side_by_side_see_each_others_pages(tmp_path: Path) -> None:
    with Store(tmp_path) as one, Store(tmp_path) as two:
        one.put([record(1)])
        assert two.get([address(1)]) == [None]
        one.flush()
        assert two.get([address(1)]) == [record(1)]
        assert two.put([record(1), record(2)]) == 1
        two.flush()
        assert one.get([address(2)]) == [record(2)]
    fill(tmp_path, range(4))
    assert sum(segment.records for segment in list_segments(tmp_path / "segments")) == 4


def test_many_segments(tmp_path: Path) -> None:
    fill(tmp_path, range(100), segment_bytes=2000)
    assert len(files(tmp_path, TABLE)) > 5
    with Store(tmp_path) as store:
        assert store.get([address(number) for number in range(100)]) == [record(number) for number in range(100)]


def test_the_oldest_are_evicted(tmp_path: Path) -> None:
    limit = 16_000
    with Store(tmp_path, max_bytes=limit) as store:
        for number in range(400):
            store.put([record(number)])
            if number % 10 == 0:
                assert sum(path.stat().st_size for path in (tmp_path / "segments").iterdir()) <= limit
        assert store.has([address(0), address(399)]) == [False, True]


def test_a_page_that_is_read_outlives_older_reads(tmp_path: Path) -> None:
    fill(tmp_path, range(40), segment_bytes=1500)
    for age, path in enumerate(files(tmp_path, DATA)):
        os.utime(path, (age, age))
    with Store(tmp_path, write=False) as store:
        places = store._known.find([address(number) for number in range(40)])
        oldest = files(tmp_path, DATA)[0].stem
        first = next(n for n, place in enumerate(places) if place is not None and place.segment == oldest)
        assert store.get([address(first)]) == [record(first)]
    with Store(tmp_path) as store:
        collect(store.segments, store.secret, 2500)
        assert store.get([address(first)]) == [record(first)]
        assert sum(store.has([address(number) for number in range(40)])) < 25


def test_no_store(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="neither a store"):
        Store(tmp_path / "full")
    with pytest.raises(BadInput, match="not a store"):
        Store(tmp_path / "none", write=False)
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(StoreError, match="store"):
            Store(path)
    with pytest.raises(BadInput, match="max_bytes"):
        Store(tmp_path / "none", max_bytes=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"version": "1"}, "not that of a store"),
        ({"format": "other"}, "not that of a store"),
        ({"check": "0" * 32}, "another secret"),
        ({"check": None}, "not that of a store"),
    ],
)
def test_foreign_and_newer_stores_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    fill(tmp_path, range(3))
    about = json.loads((tmp_path / ABOUT).read_text())
    (tmp_path / ABOUT).write_text(json.dumps(about | change))
    with pytest.raises(BadInput, match=message):
        Store(tmp_path)


def test_a_secret_of_ones_own(tmp_path: Path) -> None:
    mine = bytes(range(32))
    with Store(tmp_path, secret=mine) as store:
        store.put([record(1)])
    assert not (tmp_path / SECRET).exists()
    with pytest.raises(BadInput, match="give the one"):
        Store(tmp_path)
    with pytest.raises(BadInput, match="another secret"):
        Store(tmp_path, secret=bytes(32))
    with pytest.raises(BadInput, match="32 bytes"):
        Store(tmp_path, secret=b"short")
    with Store(tmp_path, secret=mine) as store:
        assert store.get([address(1)]) == [record(1)]


def test_the_secret_is_for_its_owner(tmp_path: Path) -> None:
    fill(tmp_path, range(1))
    assert (tmp_path / SECRET).stat().st_mode & 0o077 == 0


def test_addresses_are_of_model_tenant_and_every_token() -> None:
    def addresses(*tokens: int, model: str = "m", tenant: object = None, secret: bytes = bytes(32)) -> list[bytes]:
        return [named.address for named in Names(secret, model, tenant).of(tokens, 2)]  # type: ignore[arg-type]

    plain = addresses(1, 2, 3, 4, 5)
    assert len(plain) == 2 and plain == addresses(1, 2, 3, 4)
    others = [
        addresses(1, 2, 3, 5),
        addresses(2, 1, 3, 4),
        addresses(1, 2, 3, 4, model="n"),
        addresses(1, 2, 3, 4, tenant="a"),
        addresses(1, 2, 3, 4, tenant=1),
        addresses(1, 2, 3, 4, tenant="1"),
        addresses(1, 2, 3, 4, tenant=("a", 1)),
        addresses(1, 2, 3, 4, secret=bytes([1] * 32)),
    ]
    assert len({plain[1], *(other[1] for other in others)}) == len(others) + 1
    texts = [Names(bytes(32), "m", tenant).of((1, 2, 3, 4), 2)[1].text for tenant in (None, "a")]
    assert Names(bytes(32), "m").of((9, 9, 3, 4), 2)[1].text == texts[0] != texts[1]
    with pytest.raises(BadInput, match="isolation key"):
        Names(bytes(32), "m", frozenset())


def test_a_full_disk_keeps_what_was_flushed(tmp_path: Path) -> None:
    """The system itself refuses to let a file grow; a part of the last write has reached it."""
    with Store(tmp_path) as store:
        store.put([record(1)])
        store.flush()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (record(1).nbytes + 50, before[1]))
        try:
            with pytest.raises(StoreError, match="large"):
                store.put([record(2, 100_000)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert store.get([address(1), address(2)]) == [record(1), None]
        store.put([record(2, 100_000)])
        assert store.get([address(2)]) == [record(2, 100_000)]
    with Store(tmp_path) as store:
        assert store.get([address(1), address(2)]) == [record(1), record(2, 100_000)]
        assert verify(store.segments, store.secret).sound


@pytest.mark.parametrize("call", ["fsync", "pwrite"])
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Store(tmp_path) as store:
        store.put([record(1)])
        store.flush()
        with monkeypatch.context() as broken:
            broken.setattr(os, call, fail)
            with pytest.raises(StoreError, match="No space"):
                store.put([record(2)])
                store.flush()
        assert store.get([address(1), address(2)]) == [record(1), None]
        assert store.put([record(2)]) == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(3))
    opened = os.open

    def read_only(path: object, flags: int, *more: int) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    with Store(tmp_path, write=False) as store:
        assert store.get([address(2)]) == [record(2)]
        with pytest.raises(StoreError, match="reading only"):
            store.put([record(4)])
    with Store(tmp_path) as store:
        assert store.get([address(2)]) == [record(2)]
        with pytest.raises(StoreError, match="Read-only"):
            store.put([record(4)])


def test_segments_are_kept_that_are_evicted_while_they_are_read(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    with Store(tmp_path, write=False) as store:
        assert store.get([address(1)]) == [record(1)]
        for path in (tmp_path / "segments").iterdir():
            path.unlink()
        assert store.get([address(1)]) == [None]
