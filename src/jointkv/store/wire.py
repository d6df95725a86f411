"""Pages between two stores with one secret: the receiver says what it lacks, the sender what that needs, then bytes.

Two round trips whatever the number of pages, because many small messages cost more than their bytes:

    receiver: WANT    addresses it lacks
    sender:   OFFER   those it has, each with the address of its base
    receiver: ASK     of these and their bases, those it lacks
    sender:   RECORDS whole records, which prove themselves by their checksums

Nothing is encrypted; between machines that is for TLS or a tunnel. Addresses cannot be guessed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from socket import socket

from jointkv.errors import BadInput, StoreError
from jointkv.store.folder import Store
from jointkv.store.names import ADDRESS_BYTES
from jointkv.store.records import NO_BASE, Record, pack, scan

MAGIC = b"JKVW"
VERSION = 1
WANT, OFFER, ASK, RECORDS = 1, 2, 3, 4
_HEAD = struct.Struct("<4sBB2xQ")
MOST_ADDRESSES = 1 << 16
"""In one message; a prompt has fewer blocks."""

MOST_BYTES = 1 << 34
_OFFERED = 2 * ADDRESS_BYTES


@dataclass(frozen=True)
class Fetched:
    """What a transfer brought.

    Attributes:
        records: that were new here, bases included.
        sent_bytes, received_bytes: over the wire.
    """

    records: int
    sent_bytes: int
    received_bytes: int


def fetch(connection: socket, store: Store, addresses: Sequence[bytes]) -> Fetched:
    """Bring those of `addresses` that the other side has into `store`, flushed.

    Raises:
        BadInput: the other side speaks something else.
        StoreError: the connection broke, or `store` cannot be written. What came whole before is kept.
    """
    wire = _Wire(connection)
    lacks = _unknown(store, addresses)
    if not lacks:
        return Fetched(0, 0, 0)
    wire.send(WANT, b"".join(lacks))
    offer = wire.receive(OFFER, MOST_ADDRESSES * _OFFERED)
    if len(offer) % _OFFERED:
        raise BadInput("the other side offers parts of pages")
    named = _cut(offer, ADDRESS_BYTES)
    offered, bases = named[::2], [base for base in named[1::2] if base != NO_BASE]
    asked = _unknown(store, [*bases, *offered])
    wire.send(ASK, b"".join(asked))
    data = wire.receive(RECORDS, MOST_BYTES)
    wanted = set(asked)
    records = [r for found in scan(data, store.secret) if (r := found.record) is not None and r.address in wanted]
    count = store.put(_readable(store, records))
    store.flush()
    return Fetched(count, wire.sent, wire.received)


def serve(connection: socket, store: Store) -> int:
    """Answer `fetch` until the other side closes the connection; how many records were sent.

    Raises:
        BadInput: the other side speaks something else.
        StoreError: the connection broke.
    """
    wire, count = _Wire(connection), 0
    while wire.waiting():
        wanted = _cut(wire.receive(WANT, MOST_ADDRESSES * ADDRESS_BYTES), ADDRESS_BYTES)
        offered = [record for record in store.get(wanted) if record is not None]
        wire.send(OFFER, b"".join(record.address + record.base for record in offered))
        asked = _cut(wire.receive(ASK, 2 * MOST_ADDRESSES * ADDRESS_BYTES), ADDRESS_BYTES)
        records = [record for record in store.get(asked) if record is not None]
        wire.send(RECORDS, b"".join(pack(record, store.secret) for record in records))
        count += len(records)
    return count


class _Wire:
    """Messages over a connection, each with its kind and length before it; bytes are counted."""

    def __init__(self, connection: socket) -> None:
        self._connection = connection
        self._ahead = b""
        self.sent = self.received = 0

    def waiting(self) -> bool:
        """Whether another message begins; False when the other side has closed the connection."""
        try:
            self._ahead = self._connection.recv(1)
        except OSError as error:
            raise StoreError(f"the connection to the other store broke: {error.strerror or error}") from error
        return bool(self._ahead)

    def send(self, kind: int, body: bytes) -> None:
        try:
            self._connection.sendall(_HEAD.pack(MAGIC, VERSION, kind, len(body)) + body)
        except OSError as error:
            raise StoreError(f"the connection to the other store broke: {error.strerror or error}") from error
        self.sent += _HEAD.size + len(body)

    def receive(self, kind: int, most: int) -> bytes:
        """The body of the next message, which must be of `kind` and not longer than `most`."""
        magic, version, found, length = _HEAD.unpack(self._exactly(_HEAD.size))
        if magic != MAGIC:
            raise BadInput("the other side is no store of pages")
        if version != VERSION:
            raise BadInput(f"the other side speaks version {version}, this jointkv version {VERSION}")
        if found != kind or length > most:
            raise BadInput(f"the other side sent message {found} of {length} bytes, {kind} was expected")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        parts, left = [self._ahead], count - len(self._ahead)
        self._ahead = b""
        while left:
            try:
                part = self._connection.recv(min(left, 1 << 20))
            except OSError as error:
                raise StoreError(f"the connection to the other store broke: {error.strerror or error}") from error
            if not part:
                raise StoreError("the other store closed the connection in the middle of a message")
            parts.append(part)
            left -= len(part)
        self.received += count
        return b"".join(parts)


def _unknown(store: Store, addresses: Sequence[bytes]) -> list[bytes]:
    """Those of `addresses` that are not in `store`, each once."""
    distinct = list(dict.fromkeys(addresses))[:MOST_ADDRESSES]
    return [address for address, known in zip(distinct, store.has(distinct), strict=True) if not known]


def _readable(store: Store, records: Sequence[Record]) -> list[Record]:
    """Those of `records` that are whole with what `store` has: its page at the address of a base may be another one."""
    bases = {record.address: record for record in records}
    own = sorted({record.base for record in records} - bases.keys() - {NO_BASE})
    bases |= {record.address: record for record in store.get(own) if record is not None}
    return [record for record in records if record.base == NO_BASE or record.stands_on(bases.get(record.base))]


def _cut(data: bytes, size: int) -> list[bytes]:
    if len(data) % size:
        raise BadInput("the other side sent parts of addresses")
    return [data[start : start + size] for start in range(0, len(data), size)]
