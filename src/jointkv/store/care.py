"""Looking after a store: what is in it, whether it is whole, and making room."""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jointkv.codec.registry import CODECS
from jointkv.errors import StoreError
from jointkv.store.evict import SUFFIXES, evict, remove, sizes
from jointkv.store.index import ENTRY, Table, read_journal
from jointkv.store.records import NO_BASE, Record
from jointkv.store.scanning import entries_of, found_in
from jointkv.store.segments import DATA, JOURNAL, TABLE, SegmentWriter, lock_file, replace_table

STALE_S = 3600.0
"""What somebody was writing so long ago is left over."""


@dataclass(frozen=True)
class Segment:
    """One segment.

    Attributes:
        name: of its files.
        nbytes: of them.
        records: that the index knows.
        codecs: how many records of each codec.
        written: whether a process holds it.
        idle_s: seconds since it was last read or written.
    """

    name: str
    nbytes: int
    records: int
    codecs: dict[str, int]
    written: bool
    idle_s: float


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    Attributes:
        segments, records, nbytes: looked at; records are the whole ones.
        damaged: places, as `segment:offset`, where bytes are no record.
        torn: segments, not written by anybody, that end in the middle of a record; what a crash leaves.
        unindexed: whole records that no index leads to.
        misleading: entries of indexes that lead to no record of theirs.
        dangling: pages that others are differences to and that are not there, or have other numbers there.
    """

    segments: int
    records: int
    nbytes: int
    damaged: list[str]
    torn: list[str]
    unindexed: int
    misleading: int
    dangling: int

    @property
    def sound(self) -> bool:
        """Whether everything that was acknowledged can be read."""
        return not self.damaged and not self.misleading


@dataclass(frozen=True)
class Collected:
    """What `gc` did: segments closed that a dead process left, records dropped, bytes freed."""

    closed: int
    dropped: int
    freed_bytes: int


def list_segments(folder: Path) -> list[Segment]:
    """The segments in `folder`, those used last first. Raises StoreError when it cannot be read."""
    names, now, listed = {codec.number: name for name, codec in CODECS.items()}, time.time(), []
    with _system(folder):
        for name, (used, nbytes) in sorted(sizes(folder).items(), key=lambda item: -item[1][0]):
            try:
                written = _is_written(folder, name)
                kinds = Counter(_entries(folder, name)["kind"].tolist())
            except FileNotFoundError:  # evicted meanwhile, or an index whose segment is gone
                continue
            codecs = {names.get(kind, "unknown"): count for kind, count in sorted(kinds.items())}
            listed.append(Segment(name, nbytes, sum(kinds.values()), codecs, written, max(now - used, 0.0)))
    return listed


def verify(folder: Path, secret: bytes) -> Verified:
    """Read every byte of the segments in `folder`. Changes nothing. Raises StoreError when they cannot be read."""
    damaged, torn, bases, there = [], [], set(), set()
    counts: Counter[str] = Counter()
    with _system(folder):
        for name in _names(folder):
            try:
                written = _is_written(folder, name)
                entries = {int(e["offset"]): e for e in _entries(folder, name)}
                found = found_in(folder / f"{name}{DATA}", secret)
            except FileNotFoundError:  # evicted meanwhile
                continue
            for place in found:
                said = entries.pop(place.offset, None)
                record = place.record
                if record is None:
                    last = place.offset + place.nbytes == sum(part.nbytes for part in found)
                    if said is None and last:
                        torn += [] if written else [name]
                    else:
                        damaged.append(f"{name}:{place.offset}")
                        counts["misleading"] += said is not None
                    continue
                counts["records"] += 1
                counts["nbytes"] += place.nbytes
                if record.base == NO_BASE:
                    there.add((record.address, record.mark))
                else:
                    bases.add((record.base, record.base_mark))
                if said is None:
                    counts["unindexed"] += not written
                elif (said["address"].tobytes(), int(said["length"])) != (record.address, place.nbytes):
                    counts["misleading"] += 1
            counts["misleading"] += len(entries)
            counts["segments"] += 1
    return Verified(
        counts["segments"],
        counts["records"],
        counts["nbytes"],
        damaged,
        torn,
        counts["unindexed"],
        counts["misleading"],
        len(bases - there),
    )


def collect(folder: Path, secret: bytes, max_bytes: int | None = None) -> Collected:
    """Close what dead processes left open, drop damage, duplicates and what lacks its base, and evict to `max_bytes`.

    Segments that somebody writes stay as they are; readers and writers may go on.

    Raises:
        StoreError: another one is at it, or something cannot be written.
    """
    with _system(folder), _alone(folder):
        before = sum(size for _, size in sizes(folder).values())
        _sweep(folder)
        closed = sum(_close(folder, name, secret) for name in _names(folder))
        dropped = _rewrite(folder, secret)
        if max_bytes is not None:
            evict(folder, max_bytes)
        return Collected(closed, dropped, before - sum(size for _, size in sizes(folder).values()))


def _close(folder: Path, name: str, secret: bytes) -> bool:
    """Give a segment that nobody writes a table of all its whole records, unless it has one."""
    if (folder / f"{name}{TABLE}").exists() and Table.map(folder / f"{name}{TABLE}") is not None:
        return False
    held = lock_file(folder / f"{name}{DATA}")
    if held is None:
        return False
    try:
        replace_table(folder, name, Table.of(entries_of(folder / f"{name}{DATA}", secret)))
    finally:
        os.close(held)
    return True


def _rewrite(folder: Path, secret: bytes) -> int:
    """Copy what is live out of segments where something is not, and remove those; how many records were dropped."""
    seen: set[bytes] = set()
    there, dropped = _bases(folder, secret), 0
    for name in _names(folder):
        if _is_written(folder, name):
            continue
        records = _records(folder, name, secret)
        first = {record.address: record for record in reversed(records)}  # the one that is read
        live = [
            record
            for record in records
            if record is first[record.address]
            and record.address not in seen
            and (record.base == NO_BASE or (record.base, record.base_mark) in there)
        ]
        seen |= {record.address for record in live}
        size = (folder / f"{name}{DATA}").stat().st_size
        if sum(record.nbytes for record in live) == size:
            continue
        if live:
            writer = SegmentWriter(folder, secret)
            writer.append(live)
            writer.close()
        remove(folder, name)
        dropped += len(records) - len(live)
    return dropped


def _bases(folder: Path, secret: bytes) -> set[tuple[bytes, bytes]]:
    """Address and mark of what others may be differences to and `_rewrite` keeps: of doubles it drops all but one."""
    found, first = set(), set[bytes]()
    for name in _names(folder):
        written = _is_written(folder, name)
        for record in _records(folder, name, secret):
            if record.base == NO_BASE and (written or record.address not in first):
                found.add((record.address, record.mark))
            if not written:
                first.add(record.address)
    return found


def _records(folder: Path, name: str, secret: bytes) -> list[Record]:
    return [found.record for found in found_in(folder / f"{name}{DATA}", secret) if found.record is not None]


def _sweep(folder: Path) -> None:
    """Remove what is left of files that were never finished, and indexes without a segment."""
    names = set(_names(folder))
    for path in list(folder.iterdir()):
        half = path.name.startswith(".") and ".tmp-" in path.name
        lonely = path.suffix in SUFFIXES and path.suffix != DATA and path.stem not in names
        with suppress(FileNotFoundError):
            if (half or lonely) and time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()


def _names(folder: Path) -> list[str]:
    return sorted(entry.name.removesuffix(DATA) for entry in os.scandir(folder) if entry.name.endswith(DATA))


def _entries(folder: Path, name: str) -> np.ndarray:
    table = folder / f"{name}{TABLE}"
    mapped = Table.map(table) if table.exists() else None
    if mapped is not None:
        return mapped.entries
    journal = folder / f"{name}{JOURNAL}"
    return read_journal(journal) if journal.exists() else np.zeros(0, ENTRY)


def _is_written(folder: Path, name: str) -> bool:
    held = lock_file(folder / f"{name}{DATA}")
    if held is None:
        return True
    os.close(held)
    return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"another process is cleaning up {folder}; wait for it") from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _system(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot use the store {folder}: {error.strerror or error}") from error
