"""What `verify` finds and what `collect` mends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jointkv.errors import StoreError
from jointkv.store import Store, collect, list_segments, verify
from jointkv.store.segments import DATA, JOURNAL, TABLE, SegmentWriter
from tests.store.records import address, record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with Store(tmp_path) as made:
        made.put(record(number) for number in range(20))
    return Store(tmp_path)


def one(store: Store, suffix: str) -> Path:
    return next(store.segments.glob(f"*{suffix}"))


def test_a_sound_store(store: Store) -> None:
    found = verify(store.segments, store.secret)
    assert found.sound and (found.segments, found.records) == (1, 20)
    assert found.nbytes == sum(record(number).nbytes for number in range(20))
    (segment,) = list_segments(store.segments)
    assert segment.records == 20 and segment.codecs == {"lossless": 20} and not segment.written
    assert collect(store.segments, store.secret).dropped == 0


def test_a_flipped_bit(store: Store) -> None:
    path = one(store, DATA)
    data = bytearray(path.read_bytes())
    offset = sum(record(number).nbytes for number in range(5))
    data[offset + 120] ^= 4
    path.write_bytes(data)
    found = verify(store.segments, store.secret)
    assert not found.sound and found.damaged == [f"{path.stem}:{offset}"] and found.records == 19
    assert store.get([address(4), address(5), address(6)]) == [record(4), None, record(6)]
    assert collect(store.segments, store.secret).freed_bytes > 0
    assert verify(store.segments, store.secret).sound
    assert store.has([address(5), address(6)]) == [False, True] and store.get([address(6)]) == [record(6)]


def test_a_lost_index_is_made_anew(store: Store) -> None:
    one(store, TABLE).unlink()
    with Store(store.folder) as fresh:
        assert fresh.get([address(7)]) == [record(7)]
    assert verify(store.segments, store.secret).unindexed == 20
    assert collect(store.segments, store.secret).closed == 1
    assert verify(store.segments, store.secret).unindexed == 0 and one(store, TABLE).is_file()


def test_an_index_that_leads_astray(store: Store) -> None:
    path = one(store, TABLE)
    data = bytearray(path.read_bytes())
    data[64 + 48 : 64 + 56] = (1 << 60).to_bytes(8, "little")  # the offset of the first entry
    path.write_bytes(data)
    found = verify(store.segments, store.secret)
    assert found.misleading == 1 and found.unindexed == 1
    assert sum(each is not None for each in store.get([address(number) for number in range(20)])) == 19


def test_what_a_dead_writer_left(store: Store) -> None:
    writer = SegmentWriter(store.segments, store.secret)
    writer.append([record(30), record(31)])
    writer.flush()
    writer.append([record(32)])
    writer.abandon()
    path = store.segments / f"{writer.name}{DATA}"
    path.write_bytes(path.read_bytes()[:-7])
    found = verify(store.segments, store.secret)
    assert found.sound and found.torn == [writer.name]
    assert store.get([address(31), address(32)]) == [record(31), None]
    done = collect(store.segments, store.secret)
    assert done.closed == 1 and not list(store.segments.glob(f"*{JOURNAL}"))
    assert store.get([address(31), address(32)]) == [record(31), None]
    assert verify(store.segments, store.secret).torn == []


def test_a_segment_that_is_written_is_left_alone(store: Store) -> None:
    store.put([record(40)])
    store.flush()
    assert [segment.written for segment in list_segments(store.segments)].count(True) == 1
    done = collect(store.segments, store.secret, max_bytes=1)
    assert done.closed == 0 and store.get([address(40), address(1)]) == [record(40), None]
    store.put([record(41)])
    store.close()
    with Store(store.folder) as fresh:
        assert fresh.get([address(40), address(41)]) == [record(40), record(41)]


def test_duplicates_and_what_lacks_its_base_are_dropped(store: Store) -> None:
    writer = SegmentWriter(store.segments, store.secret)
    child, orphan = (
        replace(record(50), base=address(3), base_mark=record(3).mark),
        replace(record(51), base=address(99)),
    )
    writer.append([record(3), record(3), child, orphan])
    writer.close()
    assert verify(store.segments, store.secret).dangling == 1
    assert collect(store.segments, store.secret).dropped >= 2
    assert store.get([address(3), address(50), address(51)]) == [record(3), child, None]
    assert sum(segment.records for segment in list_segments(store.segments)) == 21


def test_two_cannot_clean_up_at_once(store: Store) -> None:
    from jointkv.store.care import _alone

    with _alone(store.segments), pytest.raises(StoreError, match="another process"):
        collect(store.segments, store.secret)


def test_no_folder(tmp_path: Path) -> None:
    for work in (lambda: verify(tmp_path / "x", bytes(32)), lambda: collect(tmp_path / "x", bytes(32))):
        with pytest.raises(StoreError):
            work()
    with pytest.raises(StoreError):
        list_segments(tmp_path / "x")
