"""Where records are. An index only hints: every record proves itself, so a damaged entry costs a page and no more.

While a segment is written its index is a journal: entries appended, each after its record has reached the disk. When it
is closed, a table takes the journal's place, which is mapped and not read.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jointkv.store.names import ADDRESS_BYTES, TEXT_BYTES

ENTRY = np.dtype(
    [
        ("address", "V32"),
        ("text", "V16"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("kind", "<u4"),
    ]
)
"""`length` counts the whole record; `kind` is the first byte of its payload."""

MAGIC = b"JKVINDEX"
VERSION = 1
_HEAD = struct.Struct("<8sIIQ40x")


@dataclass(frozen=True, eq=False)
class Table:
    """The entries of one segment.

    Attributes:
        entries: sorted by address, `[n]` of `ENTRY`.
        prefix: the first 8 bytes of their addresses, `[n]`, ascending.
        text: the first 8 bytes of their texts, ascending, `[n]`; `by_text` says of which entries.
    """

    entries: NDArray[np.void]
    prefix: NDArray[np.uint64]
    text: NDArray[np.uint64]
    by_text: NDArray[np.uint32]

    @classmethod
    def of(cls, entries: NDArray[np.void]) -> Table:
        """Sort `entries [n]`; of several with one address the first stays first."""
        order = _prefix(entries, "address", ADDRESS_BYTES).argsort(kind="stable")
        entries = entries[order]
        texts = _prefix(entries, "text", TEXT_BYTES)
        by_text = texts.argsort(kind="stable").astype(np.uint32)
        return cls(entries, _prefix(entries, "address", ADDRESS_BYTES), texts[by_text], by_text)

    def find(self, addresses: NDArray[np.void]) -> NDArray[np.int64]:
        """Which entry has each of `addresses [m]` of `V32`; -1 for none."""
        return self._search(self.prefix, None, addresses, "address", ADDRESS_BYTES)

    def find_text(self, texts: NDArray[np.void]) -> NDArray[np.int64]:
        """Which entry has each of `texts [m]` of `V16`; -1 for none."""
        return self._search(self.text, self.by_text, texts, "text", TEXT_BYTES)

    def _search(
        self,
        column: NDArray[np.uint64],
        rows: NDArray[np.uint32] | None,
        wanted: NDArray[np.void],
        name: str,
        size: int,
    ) -> NDArray[np.int64]:
        if not len(column) or not len(wanted):
            return np.full(len(wanted), -1)
        short = np.ascontiguousarray(wanted).view(np.uint8).reshape(-1, size)[:, :8].copy().view("<u8")[:, 0]
        at = column.searchsorted(short)
        at[at == len(column)] = 0
        found = np.full(len(wanted), -1)
        for number in (column[at] == short).nonzero()[0]:  # few: all others are not there
            row = int(at[number] if rows is None else rows[at[number]])
            # A damaged table may name rows it lacks.
            if row < len(self.entries) and self.entries[name][row].tobytes() == wanted[number].tobytes():
                found[number] = row
        return found

    def write(self, file: Path) -> None:
        """Write to `file` and to the disk; the caller renames it."""
        count = len(self.entries)
        with file.open("wb") as stream:
            stream.write(_HEAD.pack(MAGIC, VERSION, ENTRY.itemsize, count))
            for column in (self.entries, self.prefix, self.text, self.by_text):
                stream.write(column.tobytes())
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def map(cls, file: Path) -> Table | None:
        """The table in `file`, mapped; None if it is torn, or not one of this version."""
        with file.open("rb") as stream:
            head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        magic, version, itemsize, count = _HEAD.unpack(head)
        width = ENTRY.itemsize + 8 + 8 + 4
        sound = (magic, version, itemsize) == (MAGIC, VERSION, ENTRY.itemsize)
        if not sound or file.stat().st_size != _HEAD.size + count * width:
            return None
        if not count:
            return cls.of(np.zeros(0, ENTRY))
        data = np.memmap(file, np.uint8, "r")
        columns: list[Any] = []
        offset = _HEAD.size
        for dtype in (ENTRY, np.dtype("<u8"), np.dtype("<u8"), np.dtype("<u4")):
            columns.append(data[offset : offset + count * dtype.itemsize].view(dtype))
            offset += count * dtype.itemsize
        return cls(*columns)


def read_journal(file: Path) -> NDArray[np.void]:
    """The whole entries of a journal, `[n]` of `ENTRY`; one that is half written is left out."""
    data = file.read_bytes()
    count = len(data) // ENTRY.itemsize
    return np.frombuffer(data[: count * ENTRY.itemsize], ENTRY)


def entry(address: bytes, text: bytes, offset: int, length: int, kind: int) -> bytes:
    """One entry as a journal holds it."""
    return np.array([(address, text, offset, length, kind)], ENTRY).tobytes()


def _prefix(entries: NDArray[np.void], name: str, size: int) -> NDArray[np.uint64]:
    if not len(entries):
        return np.zeros(0, np.uint64)
    column = np.ascontiguousarray(entries[name]).view(np.uint8).reshape(-1, size)
    return column[:, :8].copy().view("<u8")[:, 0]
