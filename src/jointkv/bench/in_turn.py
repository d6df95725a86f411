"""Turns of a conversation one after another, with time to think between; whatever the load, none overtakes another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from typing import Any

Send = Callable[..., Awaitable[Any]]
Turn = tuple[int | str | None, float, str | None]
"""Session of a request, seconds to think before it, and the salt it is sent with."""


class InTurn:
    """Holds requests back until the turn before them in their session is answered, well or not.

    Args:
        send: one of vLLM's request functions, with a request and an `aiohttp.ClientSession` as first arguments, whose
            clock starts when it is called. The request's `request_id` is its number.
        turns: of the requests, in the order in which they come.
        concurrency: requests that are under way at the most; None: any number. Those that wait for their turn do not
            count.
    """

    def __init__(self, send: Send, turns: Sequence[Turn], concurrency: int | None) -> None:
        self._send, self._turns = send, turns
        self._room = nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)
        self._ended = [asyncio.Event() for _ in turns]
        self._before = list[int | None]()
        latest: dict[int | str, int] = {}
        for number, (session, _, _) in enumerate(turns):
            self._before.append(None if session is None else latest.get(session))
            if session is not None:
                latest[session] = number

    async def send(self, request: Any, session: Any, *rest: Any) -> Any:
        """Send `request` when it is its turn."""
        number = int(request.request_id)
        _, think, salt = self._turns[number]
        before = self._before[number]
        try:
            if before is not None:
                await self._ended[before].wait()
                await asyncio.sleep(think)
            if salt is not None:
                request.extra_body = {**(request.extra_body or {}), "cache_salt": salt}
            async with self._room:
                return await self._send(request, session, *rest)
        finally:
            self._ended[number].set()
