"""What one process knows of the segments of a store, and reading from them."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jointkv.store.index import Table, read_journal
from jointkv.store.names import ADDRESS_BYTES, TEXT_BYTES
from jointkv.store.scanning import entries_of
from jointkv.store.segments import DATA, JOURNAL, TABLE

Search = Callable[[Table, NDArray[np.void]], NDArray[np.int64]]

OPEN_FILES = 64
TOUCH_S = 60.0
"""A segment that is read is marked as used so often."""


@dataclass(frozen=True)
class Place:
    """Where a record is said to be: `length` bytes at `offset` of `segment`."""

    segment: str
    offset: int
    length: int


class Known:
    """The tables of all segments, and files that are open.

    Args:
        folder: of the segments.
        secret: for segments whose index is lost: their records are looked for.
    """

    def __init__(self, folder: Path, secret: bytes) -> None:
        self._folder, self._secret = folder, secret
        self._tables: dict[str, Table] = {}
        self._sizes: dict[str, int] = {}
        """Bytes that were read of each journal; tables have no entry here."""
        self._files: OrderedDict[str, int] = OrderedDict()
        self._touched: dict[str, float] = {}

    def refresh(self) -> None:
        """See what other processes have added and removed since."""
        sizes = {entry.name: entry for entry in os.scandir(self._folder)}
        names = {name.removesuffix(DATA) for name in sizes if name.endswith(DATA)}
        for name in self._tables.keys() - names:
            self._forget(name)
        for name in names:
            if name in self._tables and name not in self._sizes:
                continue
            with suppress(FileNotFoundError):  # evicted, or closed by its writer: the next look finds it
                self._look(name, sizes)

    def _look(self, name: str, files: dict[str, os.DirEntry[str]]) -> None:
        table = Table.map(self._folder / f"{name}{TABLE}") if f"{name}{TABLE}" in files else None
        if table is not None:
            self._tables[name] = table
            self._sizes.pop(name, None)
        elif f"{name}{JOURNAL}" in files:
            size = files[f"{name}{JOURNAL}"].stat().st_size
            if self._sizes.get(name) != size:
                self._tables[name] = Table.of(read_journal(self._folder / f"{name}{JOURNAL}"))
                self._sizes[name] = size
        else:
            self._tables[name] = Table.of(entries_of(self._folder / f"{name}{DATA}", self._secret))
            self._sizes.pop(name, None)

    def find(self, addresses: Sequence[bytes]) -> list[Place | None]:
        """Where each of `addresses` is; None where no table has it."""
        return self._search(addresses, ADDRESS_BYTES, Table.find)

    def find_texts(self, texts: Sequence[bytes]) -> list[Place | None]:
        """Where a block with each of `texts` is."""
        return self._search(texts, TEXT_BYTES, Table.find_text)

    def _search(self, wanted: Sequence[bytes], size: int, rows_of: Search) -> list[Place | None]:
        places: list[Place | None] = [None] * len(wanted)
        if not wanted:
            return places
        self.refresh()
        left = np.arange(len(wanted))
        column = np.frombuffer(b"".join(wanted), f"V{size}")
        for name, table in self._tables.items():
            rows = rows_of(table, column[left])
            for at in (rows >= 0).nonzero()[0]:
                found = table.entries[rows[at]]
                places[left[at]] = Place(name, int(found["offset"]), int(found["length"]))
            left = left[rows < 0]
            if not len(left):
                break
        return places

    def read(self, place: Place) -> bytes:
        """The bytes at `place`, fewer where the segment is shorter or gone."""
        file = self._open(place.segment)
        if file is None:
            return b""
        # A damaged entry may ask for any length; a file is as long as it is.
        left = max(os.fstat(file).st_size - place.offset, 0)
        return os.pread(file, min(place.length, left), place.offset) if left else b""

    def close(self) -> None:
        """Forget everything."""
        for name in list(self._tables):
            self._forget(name)
        for name in list(self._files):
            os.close(self._files.pop(name))

    def _open(self, name: str) -> int | None:
        if name in self._files:
            self._files.move_to_end(name)
        else:
            try:
                self._files[name] = os.open(self._folder / f"{name}{DATA}", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        now = time.monotonic()
        if now - self._touched.get(name, -TOUCH_S) >= TOUCH_S:
            self._touched[name] = now
            with suppress(OSError):  # where nothing can be written nothing is evicted either
                os.utime(self._folder / f"{name}{DATA}")
        return self._files[name]

    def _forget(self, name: str) -> None:
        self._tables.pop(name, None)
        self._sizes.pop(name, None)
        self._touched.pop(name, None)
        file = self._files.pop(name, None)
        if file is not None:
            os.close(file)
