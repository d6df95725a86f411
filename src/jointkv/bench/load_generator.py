"""Sends requests to a server as a load says, from a process of its own, see `jointkv.bench.load_process`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager

from jointkv.bench.load_process import LoadOutcome, Spec
from jointkv.bench.program import run_program
from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Load
from jointkv.errors import JointKVError

COMMAND = (sys.executable, "-P", "-m", "jointkv.bench.load_process")
SHUTDOWN_SECONDS = 10.0


class LoadFailed(JointKVError, RuntimeError):
    """The load generator ended without a result, or no request was answered. The message ends with the reason."""


def drive(
    spec: Spec,
    progress: Callable[[int], None],
    during: AbstractContextManager[object],
    cores: Collection[int] | None = None,
) -> LoadOutcome:
    """Send requests as `spec` says. The process that does it ends with this call.

    Args:
        progress: called with the number of requests that have ended, whenever it grows.
        during: entered just before the first request is sent and left right after the last one has ended.
        cores: where it runs; anywhere unless given.

    Raises:
        LoadFailed: there is no result, or not one complete answer in it.
    """
    environment = {**os.environ, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    answer = run_program(COMMAND, spec, environment, progress, during, cores, SHUTDOWN_SECONDS)
    if "outcome" not in answer:
        raise LoadFailed(f"the load generator failed: {answer['error']}")
    outcome = LoadOutcome.model_validate(answer["outcome"])
    if not outcome.complete:
        raise LoadFailed(f"no request was answered completely; the first one: {outcome.answers[0].error}")
    return outcome


def spec_of(url: str, model: str, tokenizer: str, load: Load, requests: Sequence[ServingRequest], seed: int) -> Spec:
    """What sends `requests` to the server at `url` as `load` says.

    Args:
        model: the name it is served under.
        tokenizer: a folder or hub name.
        requests: for a replay with timestamps, in their order.
        seed: of the arrivals; the same seed sends at the same times.
    """
    speed = load.speed  # of a replay only
    return Spec(
        url=url,
        model=model,
        tokenizer=tokenizer,
        requests=[
            (
                list(each.prompt),
                each.output_tokens,
                each.timestamp / speed if speed and each.timestamp is not None else None,
            )
            for each in requests
        ],
        rate=load.rate,
        burstiness=load.burstiness or 1.0,
        concurrency=load.concurrency,
        seed=seed,
        one_first=load.kind == "one_first",
        turns=[(each.session, each.think, each.salt) for each in requests],
    )
