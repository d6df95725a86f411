"""One stored page: what it is, what it needs, its bytes, and a checksum over all of that."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from jointkv.store.names import ADDRESS_BYTES

MAGIC = b"JKVR"
VERSION = 1
NO_BASE = bytes(ADDRESS_BYTES)
MARK_BYTES = 3
NO_MARK = bytes(MARK_BYTES)
CHECKSUM_BYTES = 16
LONGEST = 1 << 30
"""Bytes of a payload at the most; a longer one is damage."""

# Magic, version, mark of the base, length of the payload, position, address, text, address of the base.
_HEAD = struct.Struct(f"<4sB{MARK_BYTES}sIq32s16s32s")
HEAD_BYTES = _HEAD.size + CHECKSUM_BYTES


@dataclass(frozen=True)
class Record:
    """A page as the store holds it.

    Attributes:
        address, text: see `Named`.
        position: of the page's first token.
        base: address of the page that `payload` is a difference to; `NO_BASE` for none.
        payload: a message of `jointkv.codec`.
        base_mark: `mark` of the base; `NO_MARK` for none.
    """

    address: bytes
    text: bytes
    position: int
    base: bytes
    payload: bytes
    base_mark: bytes = NO_MARK

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return HEAD_BYTES + len(self.payload)

    @property
    def mark(self) -> bytes:
        """Tells its payload from another one at its address; of two that differ one in 2^24 pairs has the same.

        An address is one of text: whoever computes that text again, after an eviction or in another store, finds other
        last bits, and may have quantised them in other steps.
        """
        return hashlib.blake2b(self.payload, digest_size=MARK_BYTES, person=b"jointkv.mark").digest()

    def stands_on(self, base: Record | None) -> bool:
        """Whether `base` is the very page that the payload is a difference to."""
        return base is not None and base.base == NO_BASE and base.mark == self.base_mark


@dataclass(frozen=True)
class Found:
    """What stands at `offset` of a segment: a record, or damage of `nbytes`."""

    offset: int
    nbytes: int
    record: Record | None


def pack(record: Record, secret: bytes) -> bytes:
    """`record` as bytes."""
    about = len(record.payload), record.position, record.address, record.text, record.base
    head = _HEAD.pack(MAGIC, VERSION, record.base_mark, *about)
    return head + _checksum(head, record.payload, secret) + record.payload


def unpack(data: bytes | memoryview, secret: bytes) -> Record | None:
    """The record that `data` begins with; None unless it is whole and every bit of it is as it was written."""
    if len(data) < HEAD_BYTES:
        return None
    magic, version, mark, length, position, address, text, base = _HEAD.unpack_from(data)
    if magic != MAGIC or version != VERSION or length > LONGEST or len(data) < HEAD_BYTES + length:
        return None
    payload = bytes(data[HEAD_BYTES : HEAD_BYTES + length])
    if data[_HEAD.size : HEAD_BYTES] != _checksum(bytes(data[: _HEAD.size]), payload, secret):
        return None
    return Record(address, text, position, base, payload, mark)


def scan(data: bytes | memoryview, secret: bytes) -> Iterator[Found]:
    """Everything in a segment, in order; behind damage it goes on at the next record."""
    view, offset = memoryview(data), 0
    while offset < len(view):
        record = unpack(view[offset:], secret)
        if record is not None:
            yield Found(offset, record.nbytes, record)
            offset += record.nbytes
            continue
        after = _next(view, offset + 1, secret)
        yield Found(offset, after - offset, None)
        offset = after


def _next(view: memoryview, start: int, secret: bytes) -> int:
    """Where the next whole record begins, or the end."""
    data = bytes(view[start:])
    at = data.find(MAGIC)
    while at >= 0:
        if unpack(view[start + at :], secret) is not None:
            return start + at
        at = data.find(MAGIC, at + 1)
    return len(view)


def _checksum(head: bytes, payload: bytes, secret: bytes) -> bytes:
    digest = hashlib.blake2b(head, key=secret, digest_size=CHECKSUM_BYTES, person=b"jointkv.record")
    digest.update(payload)
    return digest.digest()
