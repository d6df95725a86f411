"""Two processes over loopback: what the receiver lacks comes, and nothing else."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jointkv.codec import Bound
from jointkv.errors import BadInput, JointKVError, StoreError
from jointkv.store import PageStore, Store, fetch, serve
from tests.codec.pages import TOKENS, fitted, near, random_pages
from tests.store.records import address, record

SECRET = bytes(range(32))
PAGES = random_pages(6)
TRANSFORM = fitted()
FIRST = list(range(6 * TOKENS))
SECOND = [500] * TOKENS + FIRST[TOKENS:]


def of(store: Store) -> PageStore:
    return PageStore(store, "m", PAGES.layout, bound=Bound(0.15, 0.25), transform=TRANSFORM)


@contextmanager
def served(folder: Path) -> Iterator[socket.socket]:
    """A connection over loopback to a process that serves the store in `folder`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = os.fork()
        if process == 0:
            status = 1
            try:
                with Store(folder, write=False, secret=SECRET) as store, listening.accept()[0] as connection:
                    serve(connection, store)
                status = 0
            finally:
                os._exit(status)
        with socket.create_connection(listening.getsockname()) as connection:
            yield connection
    assert os.waitpid(process, 0)[1] == 0


def test_the_rest_is_sent(tmp_path: Path) -> None:
    with Store(tmp_path / "sender", secret=SECRET) as store:
        of(store).put(FIRST, PAGES)
        of(store).put(SECOND, near(PAGES, 0.05))
        expected = of(store).load(SECOND)
    with Store(tmp_path / "receiver", secret=SECRET) as store, served(tmp_path / "sender") as connection:
        receiver = of(store)
        whole = fetch(connection, store, receiver.addresses(FIRST))
        assert whole.records == 6 and receiver.prefix(FIRST) == 6
        again = fetch(connection, store, receiver.addresses(SECOND))
        assert again.records == 6 and again.received_bytes < whole.received_bytes / 2
        assert receiver.load(SECOND).content.equal(expected.content)
        assert fetch(connection, store, receiver.addresses(SECOND)).sent_bytes == 0
        nothing = fetch(connection, store, [address(99)])
        assert nothing.records == 0 and nothing.received_bytes < 64


def test_bases_come_along(tmp_path: Path) -> None:
    with Store(tmp_path / "sender", secret=SECRET) as store:
        of(store).put(FIRST, PAGES)
        of(store).put(SECOND, near(PAGES, 0.05))
    with Store(tmp_path / "receiver", secret=SECRET) as store, served(tmp_path / "sender") as connection:
        assert fetch(connection, store, of(store).addresses(SECOND)).records == 11
        assert len(of(store).load(SECOND)) == 6


def test_a_sender_with_another_secret_brings_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "sender", secret=SECRET) as store:
        store.put([record(1)])
    with Store(tmp_path / "receiver") as store, served(tmp_path / "sender") as connection:
        assert fetch(connection, store, [address(1)]).records == 0
        assert store.get([address(1)]) == [None]


HEAD = struct.Struct("<4sBB2xQ")


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", BadInput, "no store"),
        (HEAD.pack(b"JKVW", 9, 2, 0), BadInput, "version 9"),
        (HEAD.pack(b"JKVW", 1, 4, 0), BadInput, "message 4"),
        (HEAD.pack(b"JKVW", 1, 2, 1 << 60), BadInput, "bytes"),
        (HEAD.pack(b"JKVW", 1, 2, 10) + bytes(10), BadInput, "parts"),
        (HEAD.pack(b"JKVW", 1, 2, 64) + bytes(10), StoreError, "middle"),
        (b"", StoreError, "middle"),
    ],
)
def test_what_is_no_store(tmp_path: Path, answer: bytes, error: type[JointKVError], message: str) -> None:
    one, two = socket.socketpair()
    other = threading.Thread(target=lambda: (two.recv(1000), two.sendall(answer), two.close()))
    other.start()
    with one, Store(tmp_path, secret=SECRET) as store, pytest.raises(error, match=message):
        fetch(one, store, [address(1)])
    other.join()


def test_differences_to_another_page_than_the_receivers_do_not_come(tmp_path: Path) -> None:
    """Both have computed the text that is a base, each in its own way."""
    with Store(tmp_path / "sender", secret=SECRET) as store:
        of(store).put(FIRST, PAGES)
        assert set(of(store).put(SECOND, near(PAGES, 0.05)).codecs[1:]) == {"reference"}
    with Store(tmp_path / "receiver", secret=SECRET) as store, served(tmp_path / "sender") as connection:
        of(store).put(FIRST, near(PAGES, 0.14, seed=9))
        assert fetch(connection, store, of(store).addresses(SECOND)).records == 1
        assert of(store).prefix(SECOND) == len(of(store).load(SECOND)) == 1
