"""Sends requests to a server as a load says, from a process of its own, see `jointkv.bench.load_process`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from jointkv.bench.load_process import LoadOutcome, Spec
from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Load
from jointkv.errors import JointKVError
from jointkv.system.machine import allowed_cores, on_cores

COMMAND = (sys.executable, "-P", "-m", "jointkv.bench.load_process")
LOG_LINES = 3
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
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        environment = {**os.environ, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        with on_cores(cores or allowed_cores()):
            process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
            )
        assert process.stdin is not None
        try:
            answer = _converse(process, spec, progress, during)
            with suppress(BrokenPipeError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(SHUTDOWN_SECONDS)
        finally:
            process.kill()
            process.wait()
        if "outcome" not in answer:
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()] or ["it ended without a word"]
            raise LoadFailed(f"the load generator failed: {answer.get('error') or ' | '.join(lines[-LOG_LINES:])}")
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


def _converse(
    process: subprocess.Popen[str], spec: Spec, progress: Callable[[int], None], during: AbstractContextManager[object]
) -> dict[str, Any]:
    """Hand over the spec, start, and read lines until the result, the error or the end."""

    def hear(said: str | None = None) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        if said is not None:
            print(said, file=process.stdin, flush=True)
        line = process.stdout.readline()
        return dict(json.loads(line)) if line else {}

    try:
        message = hear(spec.model_dump_json())
        if "ready" not in message:
            return message
        with during:
            message = hear("go")
            while "finished" in message:
                progress(message["finished"])
                message = hear()
        return message
    except BrokenPipeError:
        return {}
