"""An index made anew from the records of a segment."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jointkv.store.index import ENTRY, entry
from jointkv.store.records import Found, scan


def found_in(file: Path, secret: bytes) -> list[Found]:
    """Everything in the segment `file`, see `scan`; payloads included."""
    if not file.stat().st_size:
        return []
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return list(scan(bytes(data), secret))


def entries_of(file: Path, secret: bytes) -> NDArray[np.void]:
    """The entries of all whole records of the segment `file`, `[n]` of `ENTRY`."""
    entries = [
        entry(r.address, r.text, found.offset, found.nbytes, r.payload[0] if r.payload else 0)
        for found in found_in(file, secret)
        if (r := found.record) is not None
    ]
    return np.frombuffer(b"".join(entries), ENTRY)
