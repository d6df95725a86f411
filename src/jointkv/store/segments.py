"""Files of records: one writer each, appended only, closed for ever when full."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from jointkv.errors import StoreError
from jointkv.store.index import ENTRY, Table, entry
from jointkv.store.records import Record, pack

DATA, JOURNAL, TABLE = ".data", ".journal", ".index"


def sync_folder(folder: Path) -> None:
    """What was made, renamed or removed in `folder` is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(file: Path) -> int | None:
    """A descriptor that holds `file`, as its writer does; None if somebody holds it."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def replace_table(folder: Path, name: str, table: Table) -> None:
    """Put `table` in the place of the segment's journal: write, sync, rename, sync, remove."""
    made = folder / f".{name}{TABLE}.tmp-{os.getpid()}"
    try:
        table.write(made)
        made.replace(folder / f"{name}{TABLE}")
    finally:
        made.unlink(missing_ok=True)
    sync_folder(folder)
    (folder / f"{name}{JOURNAL}").unlink(missing_ok=True)


class SegmentWriter:
    """The one writer of a new segment in `folder`; what is flushed survives the process and the machine.

    Raises:
        StoreError: the segment cannot be made, or `append` and `flush` cannot write; what was flushed stays.
    """

    def __init__(self, folder: Path, secret: bytes) -> None:
        self._folder, self._secret = folder, secret
        self.size = 0
        self._entries: list[bytes] = []
        self._flushed = 0
        try:
            self.name, self._data, self._journal = _new_files(folder)
            sync_folder(folder)
        except OSError as error:
            raise StoreError(f"cannot write to the store {folder}: {error.strerror}") from error

    def append(self, records: Sequence[Record]) -> None:
        """Write `records` behind the others. They can be found after `flush`."""
        parts, entries, offset = [], [], self.size
        for record in records:
            packed = pack(record, self._secret)
            kind = record.payload[0] if record.payload else 0
            entries.append(entry(record.address, record.text, offset, len(packed), kind))
            parts.append(packed)
            offset += len(packed)
        self._write(self._data, b"".join(parts), self.size)
        self.size = offset
        self._entries += entries

    def flush(self) -> None:
        """Bring records to the disk, then the entries that lead to them."""
        if self._flushed == len(self._entries):
            return
        try:
            os.fsync(self._data)
        except OSError as error:
            raise StoreError(f"cannot write to the store {self._folder}: {error.strerror}") from error
        new = b"".join(self._entries[self._flushed :])
        self._write(self._journal, new, self._flushed * ENTRY.itemsize)
        try:
            os.fsync(self._journal)
        except OSError as error:
            raise StoreError(f"cannot write to the store {self._folder}: {error.strerror}") from error
        self._flushed = len(self._entries)

    def close(self) -> None:
        """Flush, and turn the journal into a table; an empty segment is removed. The writer cannot be used again."""
        try:
            if self._entries:
                self.flush()
                replace_table(self._folder, self.name, Table.of(np.frombuffer(b"".join(self._entries), ENTRY)))
            else:
                for suffix in (JOURNAL, DATA):
                    (self._folder / f"{self.name}{suffix}").unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot write to the store {self._folder}: {error.strerror}") from error
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the files as they are; `gc` finishes them."""
        for descriptor in (self._data, self._journal):
            with suppress(OSError):
                os.close(descriptor)

    def _write(self, descriptor: int, data: bytes, offset: int) -> None:
        """Write all of `data` at `offset`, or nothing that stays."""
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], offset + done)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(descriptor, offset)
            raise StoreError(f"cannot write to the store {self._folder}: {error.strerror}") from error


def _new_files(folder: Path) -> tuple[str, int, int]:
    """Name and descriptors of data and journal of a new segment, held by this process."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    while True:
        name = secrets.token_hex(8)
        # The journal first: a segment without one is taken for one whose index is lost.
        journal = os.open(folder / f"{name}{JOURNAL}", flags, 0o644)
        try:
            data = os.open(folder / f"{name}{DATA}", flags, 0o644)
        except OSError:
            os.close(journal)
            raise
        fcntl.flock(data, fcntl.LOCK_EX)
        if os.fstat(data).st_nlink:
            return name, data, journal
        # Somebody who cleans up was quicker than the lock.
        os.close(data)
        os.close(journal)
