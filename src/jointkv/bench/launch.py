"""Starts one `jointkv.bench.engine_run` with the environment that all arms share, and reads what it says."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from jointkv.bench.engine_run import EngineRun, Measured
from jointkv.errors import JointKVError
from jointkv.system.machine import core_list

GIB = 2**30
LOG_LINES = 3
SHUTDOWN_SECONDS = 30.0
COMMAND = (sys.executable, "-m", "jointkv.bench.engine_run")


class EngineRunFailed(JointKVError, RuntimeError):
    """A run ended without a result. The message ends with its reason, or the last lines of its log."""


def engine_environment(
    inherited: Mapping[str, str], cores: Collection[int], kv_bytes: int, local_model: bool
) -> dict[str, str]:
    """The environment of every arm: `inherited` with the engine in one process, on `cores`, and room for the KV pool.

    Args:
        kv_bytes: size of the largest pool of all arms; vLLM takes whole GiB.
        local_model: the model is a folder, so nothing may be looked up on the hub.
    """
    environment = {
        **inherited,
        # The scheduler is read from between steps, so it has to live in the process that measures.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Left to itself vLLM reserves one core more when a connector is set: the arms would differ.
        "VLLM_CPU_OMP_THREADS_BIND": core_list(cores),
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, -(-kv_bytes // GIB))),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if local_model:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def launch(
    run: EngineRun,
    environment: Mapping[str, str],
    finished: Callable[[int], None],
    log_file: Path | None = None,
    command: Sequence[str] = COMMAND,
) -> Measured:
    """Run `run` in a process of its own, which ends with this call, however it ends.

    Args:
        finished: called with the number of finished requests whenever it grows.
        log_file: where to leave the engine's log if the run fails.

    Raises:
        EngineRunFailed: the process ended without a result.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=dict(environment), text=True
        )
        try:
            answer = _converse(process, run, finished)
            # The result is here; an engine that hangs while it shuts down need not be waited for.
            with suppress(subprocess.TimeoutExpired):
                process.wait(SHUTDOWN_SECONDS)
        finally:
            process.kill()
            process.wait()
        if "measured" in answer:
            return Measured(**answer["measured"])
        kept = _keep_log(log, log_file)
        reason = answer.get("error") or _last_lines(log) or f"exit code {process.returncode} and an empty log"
        raise EngineRunFailed(reason + kept)


def _converse(process: subprocess.Popen[str], run: EngineRun, finished: Callable[[int], None]) -> dict[str, Any]:
    """Hand over the run and read lines until the result, the error or the end."""
    assert process.stdin is not None and process.stdout is not None
    try:
        json.dump(asdict(run), process.stdin)
        process.stdin.close()
    except BrokenPipeError:
        return {}
    for line in process.stdout:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(message, dict):
            continue
        if "finished" in message:
            finished(message["finished"])
        else:
            return dict(message)
    return {}


def _last_lines(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return " | ".join(lines[-LOG_LINES:])


def _keep_log(log: IO[str], log_file: Path | None) -> str:
    if log_file is None:
        return ""
    log.seek(0)
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file.write_text(log.read(), encoding="utf-8")
    except OSError:
        return ""
    return f" (log: {log_file})"
