"""A store: a folder of segments that several processes write to and read from at once."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Self

from jointkv.errors import BadInput, StoreError
from jointkv.store.evict import evict
from jointkv.store.known import Known, Place
from jointkv.store.names import KEY_BYTES
from jointkv.store.records import HEAD_BYTES, Record, unpack
from jointkv.store.segments import SegmentWriter, sync_folder
from jointkv.system.values import check_whole

FORMAT = "jointkv.store"
VERSION = 1
ABOUT, SECRET, SEGMENTS, TRANSFORMS = "store.json", "secret", "segments", "transforms"
SEGMENT_BYTES = 256 << 20
SEGMENTS_WITHIN_LIMIT = 8
"""A store with a limit has segments of at most this part of it: what is evicted at once."""


class Store:
    """Stored pages by their addresses.

    `put` writes, `flush` makes sure: what it returned for is found after a crash. What cannot be read whole, with every
    bit as it was written, is not there. Can be used by several threads, and its folder by several processes.

    Args:
        folder: made if it is not there and `write` is set.
        write: False leaves the folder as it is and works where it cannot be written to.
        max_bytes: segments are evicted, those longest unread first, when all together are larger; None for no limit.
        secret: 32 bytes that addresses and checksums depend on; None takes those in the folder, made with it.
        segment_bytes: of a segment at the most, or of its one record; with `max_bytes` at most an eighth of that.

    Raises:
        BadInput: the folder is something else, of a newer version, or was made with another secret.
        StoreError: it cannot be made, read or written.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        write: bool = True,
        max_bytes: int | None = None,
        secret: bytes | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        if not isinstance(folder, str | Path):
            raise BadInput(f"a store is a folder, and {folder!r} names none")
        for name, number in (("max_bytes", 1 if max_bytes is None else max_bytes), ("segment_bytes", segment_bytes)):
            check_whole(name, number)
        if secret is not None and not (isinstance(secret, bytes) and len(secret) == KEY_BYTES):
            raise BadInput(f"the secret of a store has {KEY_BYTES} bytes; leave it out to have one made")
        self.folder, self.write, self.max_bytes = Path(folder).expanduser(), write, max_bytes
        self._segment_bytes = segment_bytes
        if max_bytes is not None:
            self._segment_bytes = min(segment_bytes, max(max_bytes // SEGMENTS_WITHIN_LIMIT, 1))
        self.secret = open_folder(self.folder, write, secret)
        self.segments = self.folder / SEGMENTS
        self._writer: SegmentWriter | None = None
        self._process = os.getpid()
        self._pending: dict[bytes, Record] = {}
        self._lock = RLock()
        self._known = Known(self.segments, self.secret)
        with _named(self.folder):
            self._known.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def has(self, addresses: Sequence[bytes]) -> list[bool]:
        """Which of `addresses` are stored, by the index; reading may still find that a page is not whole."""
        with self._lock:
            missing = [address for address in addresses if address not in self._pending]
            found = dict(zip(missing, self._find(missing), strict=True))
            return [address in self._pending or found[address] is not None for address in addresses]

    def get(self, addresses: Sequence[bytes]) -> list[Record | None]:
        """The record of each of `addresses`; None where there is none that is whole."""
        with self._lock:
            missing = [address for address in addresses if address not in self._pending]
            read = {
                address: self._read(address, place) for address, place in zip(missing, self._find(missing), strict=True)
            }
            return [self._pending.get(address) or read[address] for address in addresses]

    def with_texts(self, texts: Sequence[bytes]) -> list[Record | None]:
        """A whole record with each of `texts`, wherever that text stood; None where there is none."""
        with self._lock:
            pending = {record.text: record for record in self._pending.values()}
            with _named(self.folder):
                places = self._known.find_texts(texts)
            found = []
            for text, place in zip(texts, places, strict=True):
                record = pending.get(text)
                if record is None and place is not None:
                    record = self._whole(place)
                found.append(record if record is not None and record.text == text else None)
            return found

    def put(self, records: Iterable[Record]) -> int:
        """Write those of `records` whose addresses are new; how many. They are safe after `flush`.

        Raises:
            StoreError: a full disk or a read-only folder. What was flushed stays; what was not is gone.
        """
        with self._lock:
            if not self.write:
                raise StoreError(f"the store {self.folder} was opened for reading only")
            listed = list({record.address: record for record in records}.values())
            there = self.has([record.address for record in listed])
            new = [record for record, known in zip(listed, there, strict=True) if not known]
            for record in new:
                self._append(record)
            return len(new)

    def flush(self) -> None:
        """Bring everything that was put to the disk. Raises StoreError, see `put`."""
        with self._lock:
            self._after_fork()
            if self._writer is None:
                return
            try:
                self._writer.flush()
            except StoreError:
                self._give_up()
                raise
            with _named(self.folder):
                self._known.refresh()
            self._pending.clear()

    def close(self) -> None:
        """Flush, close the segment, and forget what is known. Can be called again."""
        with self._lock:
            self._after_fork()
            writer, self._writer = self._writer, None
            self._pending.clear()
            try:
                if writer is not None:
                    writer.close()
            finally:
                self._known.close()

    def _append(self, record: Record) -> None:
        self._after_fork()
        limit = self._segment_bytes
        writer = self._writer
        if writer is not None and writer.size and writer.size + record.nbytes > limit:
            self._writer = None
            self._pending.clear()
            writer.close()
            writer = None
        try:
            if writer is None:
                if self.max_bytes is not None:
                    with _named(self.folder):
                        evict(self.segments, self.max_bytes - limit)
                writer = self._writer = SegmentWriter(self.segments, self.secret)
                with _named(self.folder):
                    self._known.refresh()
            writer.append([record])
        except StoreError:
            self._give_up()
            raise
        self._pending[record.address] = record

    def _after_fork(self) -> None:
        """A segment has one writer: a child process leaves its parent's alone and begins one of its own."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._give_up()

    def _give_up(self) -> None:
        """After a failed write nothing says what the disk has of this segment beyond what was flushed."""
        writer, self._writer = self._writer, None
        self._pending.clear()
        if writer is not None:
            writer.abandon()

    def _find(self, addresses: Sequence[bytes]) -> list[Place | None]:
        with _named(self.folder):
            return self._known.find(addresses)

    def _read(self, address: bytes, place: Place | None) -> Record | None:
        record = None if place is None else self._whole(place)
        return record if record is not None and record.address == address else None

    def _whole(self, place: Place) -> Record | None:
        if place.length < HEAD_BYTES:
            return None
        with _named(self.folder):
            return unpack(self._known.read(place), self.secret)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """What the system says inside the block becomes a `StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot use the store {folder}: {error.strerror or error}") from error


def open_folder(folder: Path, write: bool, secret: bytes | None) -> bytes:
    """Make a store of `folder` unless it is one; its secret. Raises BadInput and StoreError, see `Store`."""
    try:
        if not (folder / ABOUT).is_file():
            if not write:
                raise BadInput(f"{folder}: not a store of pages ({ABOUT} is missing)")
            _make(folder, secret)
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        version, check = about["version"], about["check"]
        if about["format"] != FORMAT or not isinstance(version, int) or not isinstance(check, str):
            raise ValueError("format")
        if version != VERSION:
            raise BadInput(
                f"{folder}: a store of version {version}, this jointkv reads {VERSION}; use the jointkv that made it, "
                "or another folder"
            )
        found = secret if secret is not None else (folder / SECRET).read_bytes()
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{folder}: the store's secret is not in it; give the one it was made with") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{folder}: {ABOUT} is not that of a store of pages ({type(error).__name__})") from None
    except OSError as error:
        raise StoreError(f"cannot open the store {folder}: {error.strerror or error}") from error
    if len(found) != KEY_BYTES or _check(found) != check:
        raise BadInput(f"{folder}: the store was made with another secret")
    return found


def _make(folder: Path, secret: bytes | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    strange = {path.name for path in folder.iterdir()} - {ABOUT, SEGMENTS, TRANSFORMS, SECRET}
    if any(not name.startswith(".tmp-") for name in strange):
        raise BadInput(f"{folder}: neither a store of pages nor an empty folder")
    if secret is None:
        _once(folder / SECRET, secrets.token_bytes(KEY_BYTES), 0o600)
        secret = (folder / SECRET).read_bytes()
    for name in (SEGMENTS, TRANSFORMS):
        (folder / name).mkdir(exist_ok=True)
    about = {"format": FORMAT, "version": VERSION, "check": _check(secret)}
    _once(folder / ABOUT, json.dumps(about).encode(), 0o644)
    sync_folder(folder)


def _once(file: Path, data: bytes, mode: int) -> None:
    """Give `file` the content `data`, whole and on the disk, unless another process was first."""
    made = file.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileExistsError):
            os.link(made, file)
    finally:
        made.unlink(missing_ok=True)


def _check(secret: bytes) -> str:
    return hashlib.blake2b(b"", key=secret, digest_size=16, person=b"jointkv.check").hexdigest()
