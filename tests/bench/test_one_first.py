"""The load "one first then all" with requests that are none: who is sent when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from jointkv.bench.one_first import OneFirst

PING, TOKEN = b": ping\n\n", b'data: {"choices": [{"text": "a"}]}\n\n'


class World:
    """A server that streams what it is told to, and a request function that reads it as vLLM's does."""

    def __init__(self, chunks: list[bytes], fails: bool = False) -> None:
        self.chunks, self.fails = chunks, fails
        self.events: list[str] = []
        self.may_go_on = asyncio.Event()

    @asynccontextmanager
    async def post(self, url: str, json: Any) -> AsyncIterator[Any]:
        assert url == "u"

        async def iter_any() -> AsyncIterator[bytes]:
            for chunk in self.chunks:
                yield chunk
            await self.may_go_on.wait()

        yield SimpleNamespace(status=200, reason="OK", content=SimpleNamespace(iter_any=iter_any))

    async def send(self, request: str, session: Any, pbar: Any = None) -> str:
        self.events.append(f"{request} sent")
        if self.fails:
            raise OSError("refused")
        async with session.post(url="u", json={}) as response:
            assert (response.status, response.reason) == (200, "OK")
            read = [chunk async for chunk in response.content.iter_any()]
        assert read == self.chunks
        self.events.append(f"{request} done")
        return request

    async def run(self) -> list[Any]:
        gate = OneFirst(self.send)
        tasks = [asyncio.create_task(gate.send(name, self, None)) for name in ("one", "two", "three")]
        for _ in range(20):  # all that can be done by then is
            await asyncio.sleep(0)
        self.events.append("later")
        self.may_go_on.set()
        return await asyncio.gather(*tasks, return_exceptions=True)


def test_all_others_follow_the_first_token() -> None:
    world = World([PING, TOKEN, TOKEN])
    assert asyncio.run(world.run()) == ["one", "two", "three"]
    assert world.events == ["one sent", "two sent", "three sent", "later", "one done", "two done", "three done"]


@pytest.mark.parametrize("chunks", [[], [PING]])
def test_without_a_token_they_wait_for_its_end(chunks: list[bytes]) -> None:
    world = World(chunks)
    assert asyncio.run(world.run()) == ["one", "two", "three"]
    assert world.events[:3] == ["one sent", "later", "one done"]


def test_a_first_request_that_fails_holds_nobody_back() -> None:
    world = World([], fails=True)
    assert all(isinstance(found, OSError) for found in asyncio.run(world.run()))
    assert world.events == ["one sent", "two sent", "three sent", "later"]
