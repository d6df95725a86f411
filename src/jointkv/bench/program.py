"""A program of a benchmark that runs in a process of its own: what it is told, what it says, and that it ends.

The first line of its stdin is what to do, as JSON, answered with `{"ready": true}` once everything is imported; the
second starts it. `{"finished": n}` follows as requests end, then `{"outcome": ...}` or `{"error": ...}`. The process
ends when stdin is closed, and so with the one that started it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from jointkv.bench.record import Record
from jointkv.system.machine import allowed_cores, on_cores

LOG_LINES = 3

Notify = Callable[[dict[str, Any]], None]


def run_program(
    command: Sequence[str],
    spec: Record,
    environment: Mapping[str, str],
    progress: Callable[[int], None],
    during: AbstractContextManager[object],
    cores: Collection[int] | None,
    patience: float,
) -> dict[str, Any]:
    """Have `command` do what `spec` says; its process ends with this call.

    Args:
        progress: called with the number of requests that have ended, whenever it grows.
        during: entered just before it starts and left right after its last word.
        cores: where it runs; anywhere unless given.
        patience: seconds that it may take to end by itself.

    Returns:
        Its last word: with `outcome`, or else with `error`, for which the end of its log stands where it said none.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        with on_cores(cores or allowed_cores()):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=dict(environment), text=True
            )
        assert process.stdin is not None
        try:
            answer = _converse(process, spec, progress, during)
            with suppress(BrokenPipeError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        finally:
            process.kill()
            process.wait()
        if "outcome" not in answer and not answer.get("error"):
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()] or ["it ended without a word"]
            answer = {"error": " | ".join(lines[-LOG_LINES:])}
    return answer


def _converse(
    process: subprocess.Popen[str],
    spec: Record,
    progress: Callable[[int], None],
    during: AbstractContextManager[object],
) -> dict[str, Any]:
    """Hand over the spec, start, and read lines until the outcome, the error or the end."""

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


def be_program(work: Callable[[str, Notify, Callable[[], None]], Record]) -> None:
    """The other end: `work` gets the spec as JSON, what says a line, and what says nothing else until it is to start.

    It calls the second with `{"ready": true}` before it calls the third; what it returns is the outcome.
    """
    # Whatever vLLM prints goes to stderr, so that stdout carries nothing but this program's own lines.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def notify(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    def wait() -> None:
        if not sys.stdin.readline():
            os._exit(1)
        threading.Thread(target=_end_with_parent, daemon=True).start()

    try:
        notify({"outcome": work(sys.stdin.readline(), notify, wait).model_dump()})
    except Exception as error:
        notify({"error": f"{type(error).__name__}: {error}"})
        raise


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)
