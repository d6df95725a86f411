"""A store whose writer is killed, or whose files end anywhere: nothing torn is read, nothing acknowledged is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jointkv.store import Store, collect, verify
from jointkv.store.segments import DATA, JOURNAL, TABLE, SegmentWriter
from tests.store.records import address, record

LARGEST = 20_000


def child(work: Callable[[int], None]) -> tuple[int, int]:
    """A process that does `work` with a pipe to write to; its number and the pipe's end to read from."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            work(write)
        finally:
            os._exit(0)
    os.close(write)
    return process, read


def acknowledged(pipe: int) -> int:
    """How many records the child said were safe."""
    data = b""
    while part := os.read(pipe, 65536):
        data += part
    os.close(pipe)
    return len(data)


def writes_on(folder: Path, first: int, draw: random.Random) -> Callable[[int], None]:
    def work(pipe: int) -> None:
        store, number = Store(folder, segment_bytes=100_000), first
        while True:
            count = draw.randrange(1, 4)
            store.put(record(number + each, LARGEST) for each in range(count))
            store.flush()
            os.write(pipe, b"x" * count)
            number += count
            if draw.random() < 0.1:
                store.close()
                store = Store(folder, segment_bytes=100_000)
            if draw.random() < 0.05:
                collect(store.segments, store.secret)

    return work


def killed(folder: Path, moments: int, seed: int) -> None:
    draw, first = random.Random(seed), 0
    Store(folder).close()
    for _ in range(moments):
        process, pipe = child(writes_on(folder, first, random.Random(draw.random())))
        time.sleep(draw.uniform(0.0, 0.03))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        safe = acknowledged(pipe)
        with Store(folder, write=False) as store:
            for number, found in enumerate(store.get([address(n) for n in range(first, first + safe + 4)])):
                expected = record(first + number, LARGEST)
                assert found == expected if number < safe else found in (None, expected)
            assert verify(store.segments, store.secret).sound
        first += safe + 10
    with Store(folder) as store:
        collect(store.segments, store.secret)
        found = verify(store.segments, store.secret)
        assert found.sound and not found.torn


def test_killed_while_it_writes(tmp_path: Path) -> None:
    killed(tmp_path, 20, seed=0)


@pytest.mark.slow
def test_killed_at_200_moments(tmp_path: Path) -> None:
    killed(tmp_path, 200, seed=1)


@pytest.mark.parametrize("suffix", [DATA, JOURNAL])
def test_files_that_end_anywhere(tmp_path: Path, suffix: str) -> None:
    """What a crash of the machine leaves of a segment that was being written."""
    with Store(tmp_path) as store:
        writer = SegmentWriter(store.segments, store.secret)
        records = [record(number, 40) for number in range(4)]
        for each in records:
            writer.append([each])
            writer.flush()
        writer.abandon()
        path = store.segments / f"{writer.name}{suffix}"
        whole = path.read_bytes()
        for end in range(0, len(whole), 3):
            path.write_bytes(whole[:end])
            with Store(tmp_path, write=False) as opened:
                found = opened.get([each.address for each in records])
            assert all(one in (None, each) for one, each in zip(found, records, strict=True))
            before = sum(each.nbytes for each in records) if suffix == DATA else len(whole)
            assert None not in found or end < before
        path.write_bytes(whole)
        assert store.get([each.address for each in records]) == records


def test_a_table_that_ends_anywhere(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put(record(number, 40) for number in range(3))
    path = next(store.segments.glob(f"*{TABLE}"))
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with Store(tmp_path, write=False) as opened:
            assert opened.get([address(number) for number in range(3)]) == [record(number, 40) for number in range(3)]


def test_a_child_does_not_write_where_its_parent_does(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put([record(1)])

        def work(pipe: int) -> None:
            store.put([record(2)])
            store.flush()
            store.close()
            os.write(pipe, b"x")

        process, pipe = child(work)
        assert acknowledged(pipe) == 1
        os.waitpid(process, 0)
        store.put([record(3)])
        store.flush()
        assert store.get([address(number) for number in (1, 2, 3)]) == [record(1), record(2), record(3)]
    with Store(tmp_path, write=False) as store:
        assert store.get([address(number) for number in (1, 2, 3)]) == [record(1), record(2), record(3)]
        assert verify(store.segments, store.secret).sound


def test_a_folder_that_two_processes_make_at_once(tmp_path: Path) -> None:
    def work(pipe: int) -> None:
        with Store(tmp_path / "store") as store:
            store.put([record(os.getpid())])
        os.write(pipe, b"x")

    children = [child(work) for _ in range(8)]
    assert [acknowledged(pipe) for _, pipe in children] == [1] * 8
    for process, _ in children:
        os.waitpid(process, 0)
    with Store(tmp_path / "store", write=False) as store:
        assert None not in store.get([address(process) for process, _ in children])
