"""One request first, and all others once its first token is there: whatever they share is resident then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

Send = Callable[..., Awaitable[Any]]
TOKEN = b"data: {"
"""What the stream of an answer has with its first token, and no comment or empty line has."""


class OneFirst:
    """Holds requests back behind the one that was sent first.

    Args:
        send: one of vLLM's request functions, with a request and an `aiohttp.ClientSession` as first arguments. Its
            clock starts when it is called, so that waiting here is no part of a request's times.
    """

    def __init__(self, send: Send) -> None:
        self._send, self._first_is_out = send, False
        self._answering = asyncio.Event()

    async def send(self, request: Any, session: Any, *rest: Any) -> Any:
        """Send `request` when it may go; the first one that fails lets the others go, too."""
        if self._first_is_out:
            await self._answering.wait()
            return await self._send(request, session, *rest)
        self._first_is_out = True
        try:
            return await self._send(request, SimpleNamespace(post=self._heard(session)), *rest)
        finally:
            self._answering.set()

    def _heard(self, session: Any) -> Callable[..., Any]:
        """`session.post`, with an answer that is as it was and tells when its first token passes."""

        @asynccontextmanager
        async def post(**what: Any) -> AsyncIterator[Any]:
            async with session.post(**what) as response:

                async def iter_any() -> AsyncIterator[bytes]:
                    async for chunk in response.content.iter_any():
                        if TOKEN in chunk:
                            self._answering.set()
                        yield chunk

                content = SimpleNamespace(iter_any=iter_any)
                yield SimpleNamespace(status=response.status, reason=response.reason, content=content)

        return post
