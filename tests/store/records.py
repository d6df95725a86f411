"""Records whose content follows from a number, so that whoever reads one knows what it must be."""

from __future__ import annotations

import hashlib
import random

from jointkv.store.records import NO_BASE, Record


def record(number: int, size: int = 200) -> Record:
    """The record `number`, of at most `size` bytes."""
    draw = random.Random(number)
    payload = bytes([2]) + draw.randbytes(draw.randrange(size))
    address = hashlib.sha256(str(number).encode()).digest()
    return Record(address, address[:16], number, NO_BASE, payload)


def address(number: int) -> bytes:
    """Of the record `number`."""
    return record(number, 1).address
