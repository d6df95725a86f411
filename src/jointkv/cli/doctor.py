"""`jointkv doctor`: is fusion live in the engine that is installed here?"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import typer
from rich.console import Console
from rich.text import Text

from jointkv.cli.console import named_errors, stages, stderr_console, write_json
from jointkv.cli.loading import locate
from jointkv.cli.options import Json
from jointkv.cli.vllm_installed import require_vllm

COMMAND = (sys.executable, "-P", "-m", "jointkv.vllm_plugin.doctor.examine")
LOG_LINES = 12
LONGEST = 86400.0
"""Seconds of a day."""

STYLES = {"ok": "green", "failed": "red", "not run": "yellow"}


@dataclass(frozen=True)
class Check:
    """One row: `status` is `"ok"`, `"failed"` or `"not run"`."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class Examination:
    """What the examined process said before it ended.

    Attributes:
        statistics: of the plugin at the end, None if it did not come so far.
        log: the last lines of the engine's log.
    """

    checks: list[Check]
    statistics: dict[str, Any] | None
    log: list[str]

    @property
    def ok(self) -> bool:
        """Every check was made and is fine."""
        return all(check.status == "ok" for check in self.checks)


@named_errors()
def doctor(
    model: str | None = typer.Option(None, help="Known name, folder or hub name instead of a tiny random model."),
    allow_untested: bool = typer.Option(False, "--allow-untested", help="Try a vLLM or device that was never run."),
    timeout: float = typer.Option(600.0, min=1.0, max=LONGEST, metavar="SECONDS", help="Give up after this long."),
    json_file: Json = None,
) -> None:
    """Check, hook by hook, that the plugin is live and right here.

    A tiny model is served without and with fusion, duplicate prompts are merged and every token is compared; then once
    more with reuse, for prompts whose text is resident.

    Exit code 0: all is well; 1: a check failed; 2: vLLM is missing or the input is bad.
    """
    require_vllm()
    from jointkv.system.machine import machine, versions

    patient = {"model": None if model is None else locate(model), "allow_untested": allow_untested}
    with stages("looking at this machine") as show, tempfile.TemporaryDirectory(prefix="jointkv-doctor-") as folder:
        examination = examine({"folder": folder, **patient}, show, timeout)
    advice = environment_advice()
    result = {
        "format": "jointkv.doctor/1",
        "ok": examination.ok,
        "model": model or "tiny random Llama",
        "checks": examination.checks,
        "advice": advice,
        "statistics": examination.statistics,
        "versions": versions(),
        "machine": machine(),
    }
    write_json(json_file, result)
    if json_file != "-":
        _print(examination.checks, advice)
    if not examination.ok:
        for line in examination.log:
            stderr_console().print(Text(line), soft_wrap=True)
        raise typer.Exit(code=1)


def examine(
    patient: Mapping[str, Any], show: Callable[[str], None], timeout: float, command: tuple[str, ...] = COMMAND
) -> Examination:
    """Have a process of its own examine `patient`; it ends with this call, however it ends."""
    environment = _environment(os.environ, offline=patient["model"] is None)
    pipe, start = subprocess.PIPE, time.monotonic()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=environment, text=True) as process,
    ):
        watchdog = threading.Timer(timeout, process.kill)
        watchdog.start()
        try:
            done, statistics, stage = _listen(process, patient, show)
            code = process.wait()
        finally:
            watchdog.cancel()
            process.kill()
        late = time.monotonic() - start >= timeout
        ending = f"was ended after {timeout:g} s" if late else f"ended with exit code {code}"
        crash = f"the engine's process {ending} while {stage}" if code else None
        return Examination(_complete(done, crash), statistics, _tail(log))


def _listen(
    process: subprocess.Popen[str], patient: Mapping[str, Any], show: Callable[[str], None]
) -> tuple[dict[str, Check], dict[str, Any] | None, str]:
    assert process.stdin is not None and process.stdout is not None
    checks: dict[str, Check] = {}
    statistics, stage = None, "starting"
    try:
        json.dump(patient, process.stdin)
        process.stdin.close()
    except BrokenPipeError:
        return checks, statistics, stage
    for line in process.stdout:
        message = json.loads(line)
        if "stage" in message:
            stage = message["stage"]
            show(stage)
        elif "check" in message:
            check = Check(**message["check"])
            # A check that has failed stays failed.
            if check.name not in checks or checks[check.name].status == "ok":
                checks[check.name] = check
        else:
            statistics = message["statistics"]
    return checks, statistics, stage


def _complete(done: Mapping[str, Check], crash: str | None) -> list[Check]:
    """All rows in their order. After a crash the first one that was not reached has failed."""
    from jointkv.vllm_plugin.doctor.examine import CHECKS

    checks = []
    for name in CHECKS:
        if name in done:
            checks.append(done[name])
        elif crash is not None:
            checks.append(Check(name, "failed", crash))
            crash = None
        else:
            checks.append(Check(name, "not run", ""))
    return checks


def _environment(inherited: Mapping[str, str], offline: bool) -> dict[str, str]:
    """The engine in one process, where all of it can be looked at; settings of the user's stay."""
    from jointkv.system.machine import allowed_cores, core_list

    cores = core_list(allowed_cores())
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    fixed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "PYTHONWARNINGS": "ignore"}
    return {**defaults, **inherited, **fixed, **({"HF_HUB_OFFLINE": "1"} if offline else {})}


def _tail(log: IO[str]) -> list[str]:
    log.seek(0)
    return [line.rstrip() for line in log if line.strip()][-LOG_LINES:]


def environment_advice() -> list[str]:
    """What to know about this machine; none of it keeps fusion from working."""
    from jointkv.system.machine import fast_dtype
    from jointkv.system.settings import Settings

    advice = []
    if fast_dtype() == "float32":
        advice.append("this processor has no AVX-512: bfloat16 is many times slower here, serve with --dtype float32")
    compiler = Settings.from_environment().cc.split()
    if not compiler or shutil.which(compiler[0]) is None:
        advice.append("no C compiler: comparing pages is some fifty times slower; install gcc or clang, or set CC")
    if importlib.util.find_spec("triton") is None:
        advice.append("vLLM logs that Triton is not installed; jointkv does not need it")
    return advice


def _print(checks: list[Check], advice: list[str]) -> None:
    console = Console()
    for check in checks:
        rest = f" {check.name:<20} {check.detail}".rstrip()
        console.print(Text.assemble((f"{check.status:<8}", STYLES[check.status]), rest), soft_wrap=True)
    for line in advice:
        console.print(Text(f"note: {line}"), soft_wrap=True)
