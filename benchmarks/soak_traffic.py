"""The load of the soak: random requests of several tenants, and clients that do not all wait for the end."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

VOCABULARY = 512
HEAD, LONGEST = 16, 400
"""Tokens of a prompt that are its own, and of the longest prompt."""

PATIENCE_SECONDS = 600.0
"""A request without any answer for so long is lost."""

Ending = Literal["stream", "whole", "leave at once", "leave", "hang up", "abort"]
ENDINGS: dict[Ending, float] = {
    "stream": 0.55,
    "whole": 0.25,
    "leave at once": 0.03,  # the connection is closed before the first token
    "leave": 0.08,  # after some of them
    "hang up": 0.03,  # while a whole answer is waited for
    "abort": 0.06,  # through the server's own endpoint
}


@dataclass(frozen=True)
class Request:
    """What one client asks, and how it leaves."""

    name: str
    kind: str
    prompt: tuple[int, ...]
    out: int
    salt: str | None
    opted_out: bool
    ending: Ending
    after: int
    """Tokens after which a client that does not wait leaves or aborts."""

    def body(self, model: str) -> dict[str, Any]:
        """What is posted to `/v1/completions`."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.out,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": self.ending not in ("whole", "hang up"),
        }
        if self.salt is not None:
            body["cache_salt"] = self.salt
        if self.opted_out:
            body["vllm_xargs"] = {"jointkv": 0}
        return body


class Traffic:
    """Draws requests, the same ones for a seed: some share long texts behind heads of their own, some are repeated."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.salts = [None, *(f"salt-{self._draw.randbytes(8).hex()}" for _ in range(2))]
        self._texts = [self._tokens(LONGEST) for _ in range(2)]
        self._last: dict[str | None, tuple[int, ...]] = {}
        self._number = 0

    def __iter__(self) -> Iterator[list[Request]]:
        while True:
            yield self.next()

    def next(self) -> list[Request]:
        """One request, or two equal ones that arrive at once."""
        draw = self._draw
        salt = draw.choice(self.salts)
        kind = draw.choices(("near", "again", "longer", "twins", "unrelated"), (50, 12, 8, 15, 15))[0]
        opted_out = kind == "near" and draw.random() < 0.1
        prompt = self._prompt(kind, salt)
        if not opted_out:  # its pages must not be those of others by an exact prefix
            self._last[salt] = prompt
        return [self._request(kind, prompt, salt, opted_out) for _ in range(2 if kind == "twins" else 1)]

    def _prompt(self, kind: str, salt: str | None) -> tuple[int, ...]:
        draw, last = self._draw, self._last.get(salt)
        if kind == "again" and last is not None:
            return last
        if kind == "longer" and last is not None:
            return (*last, *self._tokens(40))[:LONGEST]
        if kind == "unrelated":
            return self._tokens(draw.randrange(1, LONGEST))
        shared = draw.choice(self._texts)[HEAD : draw.randrange(64, LONGEST - 20)]
        return (*self._tokens(HEAD), *shared, *self._tokens(draw.randrange(20)))

    def _request(self, kind: str, prompt: tuple[int, ...], salt: str | None, opted_out: bool) -> Request:
        draw = self._draw
        self._number += 1
        ending = draw.choices(tuple(ENDINGS), tuple(ENDINGS.values()))[0]
        out = draw.choice((1, 2, 8, 24, 48, 80))
        name = f"soak-{self._number}"
        return Request(name, kind, prompt, out, salt, opted_out, ending, draw.randrange(1, out + 1))

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._draw.choices(range(10, VOCABULARY), k=count))


@dataclass
class Tally:
    """What became of the requests.

    Attributes:
        sent: by kind.
        ended: by ending, as it came about: `finished`, `left`, `aborted`, `lost`.
        lost: what happened to requests that got less than they were to get.
        finished: a fair sample of at most `sample` finished requests that took part, with their answers.
    """

    seed: int
    sample: int
    sent: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    lost: list[str] = field(default_factory=list)
    finished: list[tuple[Request, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw, self._eligible = random.Random(self.seed), 0

    def add(self, request: Request, ended: str, answer: list[int]) -> None:
        """Count one more."""
        self.sent[request.kind] += 1
        self.ended[ended] += 1
        self.tokens += len(answer)
        if ended != "finished" or request.opted_out:
            return
        self._eligible += 1
        if len(self.finished) < self.sample:
            self.finished.append((request, answer))
        elif (place := self._draw.randrange(self._eligible)) < self.sample:
            self.finished[place] = request, answer

    def lose(self, request: Request, why: str) -> None:
        """Count a request that got less than it was to get."""
        self.add(request, "lost", [])
        self.lost.append(f"{request.name} ({request.ending}): {why}")


class Client:
    """Sends requests to the server at `url`, each on a connection of its own."""

    def __init__(self, url: str, model: str, session: aiohttp.ClientSession) -> None:
        self.url, self.model, self._session = url, model, session

    async def post(self, path: str, body: Any = None, **options: Any) -> Any:
        """The JSON that `path` answers. Raises what aiohttp raises."""
        async with self._session.post(self.url + path, json=body or {}, raise_for_status=True, **options) as response:
            return json.loads(await response.read() or b"null")

    async def send(self, request: Request, tally: Tally) -> None:
        """Ask, read or leave as the request says, and count how it ended."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await (self._read_whole if request.ending in ("whole", "hang up") else self._read_stream)(
                    request, tally
                )
        except Exception as error:  # whatever it was, the client has no answer
            tally.lose(request, f"{type(error).__name__}: {error}")

    async def _read_whole(self, request: Request, tally: Tally) -> None:
        headers = {"X-Request-Id": request.name}
        asked = asyncio.ensure_future(self.post("/v1/completions", request.body(self.model), headers=headers))
        if request.ending == "hang up":
            done, _ = await asyncio.wait([asked], timeout=0.02 * request.after)
            if not done:
                asked.cancel()
                await asyncio.wait([asked])
                tally.add(request, "left", [])
                return
        (choice,) = (await asked)["choices"]
        self._count_finished(request, tally, choice["token_ids"], choice["finish_reason"])

    async def _read_stream(self, request: Request, tally: Tally) -> None:
        answer: list[int] = []
        reason: str | None = None
        headers = {"X-Request-Id": request.name}
        async with self._session.post(
            f"{self.url}/v1/completions", json=request.body(self.model), headers=headers, raise_for_status=True
        ) as response:
            if request.ending == "leave at once":
                response.close()
                tally.add(request, "left", [])
                return
            asked_to_abort = False
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                (choice,) = json.loads(line[6:])["choices"]
                answer += choice["token_ids"]
                reason = choice["finish_reason"] or reason
                if request.ending == "leave" and len(answer) >= request.after:
                    response.close()
                    tally.add(request, "left", answer)
                    return
                if request.ending == "abort" and len(answer) >= request.after and not asked_to_abort:
                    asked_to_abort = True
                    await self.post("/inference/v1/abort_requests", {"request_ids": [f"cmpl-{request.name}-0"]})
        if reason == "abort" and asked_to_abort:
            tally.add(request, "aborted", answer)
        else:
            self._count_finished(request, tally, answer, reason)

    @staticmethod
    def _count_finished(request: Request, tally: Tally, answer: list[int], reason: str | None) -> None:
        if reason == "length" and len(answer) == request.out:
            tally.add(request, "finished", answer)
        else:
            tally.lose(request, f"{len(answer)} of {request.out} tokens came, and the reason {reason}")


async def load(
    client: Client, traffic: Traffic, tally: Tally, seconds: float, in_flight: int, draw: random.Random
) -> None:
    """Send requests at random times for `seconds`, at most `in_flight` at once; return when all have ended."""
    clock = asyncio.get_running_loop().time
    end, running = clock() + seconds, set[asyncio.Task[None]]()
    while clock() < end:
        for request in traffic.next():
            while len(running) >= in_flight:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running.add(asyncio.create_task(client.send(request, tally)))
        await asyncio.sleep(draw.expovariate(40.0))
    if running:
        await asyncio.wait(running)
