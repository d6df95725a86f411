"""What a server serves before it is measured: a few short requests, and requests of the same traffic."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jointkv.bench.plan import Plan
from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Arm
from jointkv.bench.reuse import Warmup
from jointkv.bench.server import ANSWER_SECONDS, Server, ServerFailed, get
from jointkv.bench.watch import Watch
from jointkv.store.segments import DATA

WARM_UP_REQUESTS = 4
WARM_UP_PROMPT_TOKENS = 40
OUTPUT_TOKENS = 8
"""Enough for the blocks of a prompt to be compared before their request has ended."""
AT_ONCE = 8
SETTLED_SECONDS = 3.0
"""A store that has not grown for so long has what was served."""


def warm_up(server: Server, model: str, requests: Sequence[ServingRequest]) -> None:
    """Serve a few short requests at once that share nothing with `requests`, then forget them.

    Raises:
        ServerFailed: one was not answered, or the cache could not be emptied.
    """
    source = [token for request in requests for token in reversed(request.prompt)]
    length = min(WARM_UP_PROMPT_TOKENS, max(len(request.prompt) for request in requests))
    offsets = [(number * length) % max(1, len(source) - length) for number in range(WARM_UP_REQUESTS)]
    _serve(server, model, [(source[offset : offset + length], None) for offset in offsets])
    server.reset_prefix_cache()


def fill(server: Server, plan: Plan, store: Path) -> None:
    """Serve the requests of `plan`, a few tokens each, unless `store` has pages, and wait until theirs are there.

    Raises:
        ServerFailed: one was not answered.
    """
    if _nbytes(store):
        return
    _serve(server, plan.model, [(request.prompt, request.salt) for request in plan.requests])
    before, deadline = -1, time.monotonic() + ANSWER_SECONDS
    while before != (now := _nbytes(store)) and time.monotonic() < deadline:
        before = now
        time.sleep(SETTLED_SECONDS)


def warm_traffic(plan: Plan, server: Server, arm: Arm) -> Warmup | None:
    """Serve the requests of `plan` that are for this, a few tokens each; what they leave in the pool stays there.

    Raises:
        ServerFailed: one was not answered.
    """
    requests = served_before(plan, arm)
    if not requests:
        return None
    began = time.perf_counter()
    with Watch(server.url) as watch:
        _serve(server, plan.model, [(request.prompt, request.salt) for request in requests])
        seconds = time.perf_counter() - began
    return Warmup(requests=len(requests), seconds=seconds, reuse=watch.reuse())


def served_before(plan: Plan, arm: Arm) -> Sequence[ServingRequest]:
    """The requests for the warm-up of `arm`.

    An arm that reuses gets all of them, for evidence adds up. Another one gets the last of them, as many as its pool
    holds: nothing of those before could be left.
    """
    return plan.warmup if arm.reuses else _last(plan.warmup, arm.pool_blocks * plan.facts["block_size"])


def _serve(server: Server, model: str, prompts: Iterable[tuple[Sequence[int], str | None]]) -> None:
    """Prompts with their salts."""

    def send(salted: tuple[Sequence[int], str | None]) -> None:
        prompt, salt = salted
        body = {"model": model, "prompt": list(prompt), "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
        if salt is not None:
            body["cache_salt"] = salt
        get(f"{server.url}/v1/completions", timeout=ANSWER_SECONDS, body=body)

    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(send, prompts))
    except OSError as error:
        server.require_alive("in its warm-up")
        raise ServerFailed(f"the server did not answer the warm-up: {error}") from None


def _nbytes(store: Path) -> int:
    return sum(file.stat().st_size for file in store.glob(f"segments/*{DATA}"))


def _last(requests: Sequence[ServingRequest], tokens: int) -> Sequence[ServingRequest]:
    """The last of `requests` whose prompts have `tokens` together; at least one."""
    for number in range(len(requests) - 1, 0, -1):
        tokens -= len(requests[number].prompt)
        if tokens <= 0:
            return requests[number:]
    return requests
