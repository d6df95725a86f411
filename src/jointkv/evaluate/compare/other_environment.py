"""Comparison across environments: methods whose packages are not installed here run in a process of another one.

`python -m jointkv.evaluate.compare.other_environment JOB.json RESULT.jsonl` is that process. It reads a job, writes one
row per line, and prints a line of progress before each method.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from jointkv.errors import BadInput, JointKVError
from jointkv.evaluate.compare.comparison import MethodRow, Progress, Wanted, iter_methods, not_run, run_methods
from jointkv.evaluate.methods import get_method
from jointkv.evaluate.methods.base import Batch
from jointkv.evaluate.traffic.base import Request

JOB_FORMAT = "jointkv.methods.job/1"
STDERR_LINES = 3
ROW = TypeAdapter(MethodRow)
SILENCE_SECONDS = 1800.0
"""A worker that prints nothing for so long is ended; it prints a line before each method."""


class _Wanted(BaseModel):
    name: str
    level: float


class _Request(BaseModel):
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


class _Job(BaseModel):
    """What `make_job` makes."""

    model: str
    dtype: str
    block_size: int = Field(ge=1)
    traffic: str
    generate: int = Field(ge=0)
    requests: tuple[_Request, ...]
    methods: tuple[_Wanted, ...]


def compare_methods(
    batch: Batch,
    wanted: Sequence[Wanted],
    *,
    model_folder: str | Path,
    worker_python: str | Path | None = None,
    traffic: str = "",
    generate: int = 0,
    progress: Progress | None = None,
    silence_seconds: float = SILENCE_SECONDS,
) -> list[MethodRow]:
    """Rows for `wanted`, in that order: those whose packages are here run here, the others in `worker_python`.

    Each is compared with the unfused model of the environment it ran in. `model_folder` holds the model of `batch`, for
    the worker to load; `worker_python` is the interpreter of the other environment (`make setup-eval`), whose process
    is ended when it prints nothing for `silence_seconds`. What could not be run has a row that says why. What `batch`
    has prefilled is released before a worker starts, which needs the memory for its own.
    """
    elsewhere = [each for each in wanted if each[0].missing_packages()]
    here = [each for each in wanted if not each[0].missing_packages()]
    rows = run_methods(batch, here, generate, progress, traffic=traffic) if here else []
    if elsewhere:
        job = make_job(batch, elsewhere, model_folder=model_folder, traffic=traffic, generate=generate)
        batch.release()
        rows += run_in_worker(job, elsewhere, worker_python, progress, silence_seconds)
    order = {id(each): place for place, each in enumerate(wanted)}
    placed = sorted(zip(here + elsewhere, rows, strict=True), key=lambda pair: order[id(pair[0])])
    return [row for _, row in placed]


def make_job(
    batch: Batch, wanted: Sequence[Wanted], *, model_folder: str | Path, traffic: str = "", generate: int = 0
) -> dict[str, Any]:
    """What `run_job` needs, as JSON can hold it."""
    return {
        "format": JOB_FORMAT,
        "model": str(model_folder),
        "dtype": str(batch.model.dtype).removeprefix("torch."),
        "block_size": batch.block_size,
        "traffic": traffic,
        "generate": generate,
        "requests": [{"prompt": each.prompt, "continuation": each.continuation} for each in batch.requests],
        "methods": [{"name": method.name, "level": level} for method, level in wanted],
    }


def run_in_worker(
    job: dict[str, Any],
    wanted: Sequence[Wanted],
    python: str | Path | None,
    progress: Progress | None = None,
    silence_seconds: float = SILENCE_SECONDS,
) -> list[MethodRow]:
    """Run `job` under the interpreter `python`. Where that fails, rows that say why follow those that were made."""
    rows: list[MethodRow] = []
    reason = f"no environment of the baselines at {python}; run: make setup-eval"
    if python is not None and Path(python).is_file():
        try:
            rows, reason = _run_process(job, python, progress or (lambda line: None), silence_seconds)
        except OSError as error:
            reason = f"the worker {python} could not be started: {error}"
    return rows + [not_run(method, level, reason, job["traffic"]) for method, level in wanted[len(rows) :]]


def _run_process(
    job: dict[str, Any], python: str | Path, progress: Progress, silence_seconds: float
) -> tuple[list[MethodRow], str]:
    """The rows that a worker made, and why there are no more of them."""
    with tempfile.TemporaryDirectory(prefix="jointkv-methods-") as folder:
        paths = [Path(folder) / name for name in ("job.json", "result.jsonl")]
        paths[0].write_text(json.dumps(job))
        command = [str(python), "-m", "jointkv.evaluate.compare.other_environment", *map(str, paths)]
        with (Path(folder) / "stderr").open("w+") as errors:
            code = _follow(command, errors, progress, silence_seconds)
            errors.seek(0)
            last = " | ".join(errors.read().strip().splitlines()[-STDERR_LINES:])
        ended = f"the worker ended with exit code {code}"
        if code is None:
            ended = f"the worker was ended after {silence_seconds:g} s without output"
        try:
            rows = read_rows(paths[1]) if paths[1].is_file() else []
        except BadInput as error:
            return [], f"{error}; {ended}"
        return rows, f"{ended}: {last}" if last else ended


def read_rows(path: Path) -> list[MethodRow]:
    """What a worker has written, without the part of a line that one may leave that dies. Raises `BadInput`."""
    try:
        return [ROW.validate_json(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except (OSError, ValidationError) as error:
        raise BadInput(f"{path.name} is not what a worker writes: {_first(error)}") from None


def read_job(path: Path) -> dict[str, Any]:
    """A job as `make_job` makes it; `run_job` looks closer. Raises `BadInput`."""
    try:
        job = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: {error}") from None
    if not isinstance(job, dict):
        raise BadInput(f"{path}: a JSON object expected")
    return job


def _first(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    problem = error.errors()[0]
    return ".".join(["", *map(str, problem["loc"])]).lstrip(".") + f": {problem['msg']}"


def _follow(command: Sequence[str], errors: IO[str], progress: Progress, silence_seconds: float) -> int | None:
    """Run `command` and report its lines; its exit code, or None when it was ended for silence.

    Whatever is raised here, such as a KeyboardInterrupt, ends the process and those that it started.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True).start()
    try:
        while (line := lines.get(timeout=silence_seconds)) is not None:
            progress(line)
        return process.wait()
    except queue.Empty:
        return None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read_lines(stream: IO[bytes], lines: queue.Queue[str | None]) -> None:
    """Put the lines of `stream`, then None, into `lines`; in a thread, so that who reads them can stop waiting."""
    with stream:
        for line in stream:
            lines.put(line.decode(errors="replace").rstrip())
    lines.put(None)


def run_job(job: dict[str, Any], progress: Progress | None = None) -> Iterator[MethodRow]:
    """Load the model of `job` and run its methods; raises `BadInput` for what is no job, a method
    that is unknown, or a model that cannot be loaded.
    """
    if job.get("format") != JOB_FORMAT:
        raise BadInput(f"a job of format {JOB_FORMAT} expected, got {str(job.get('format'))[:40]}")
    try:
        asked = _Job.model_validate(job)
    except ValidationError as error:
        raise BadInput(f"the job is malformed: {_first(error)}") from None
    wanted = [(get_method(each.name), each.level) for each in asked.methods]
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=asked.dtype, trust_remote_code=False).eval()
    except Exception as error:  # transformers checks little of what it reads
        raise BadInput(f"cannot load the model {asked.model}: {type(error).__name__}: {error}") from error
    requests = [Request(each.prompt, each.continuation, "") for each in asked.requests]
    batch = Batch(model, requests, asked.block_size)
    return iter_methods(batch, wanted, asked.generate, progress, traffic=asked.traffic)


def main(arguments: Sequence[str]) -> int:
    """Run the job of the file `arguments[0]`, write its rows to `arguments[1]`."""
    if len(arguments) != 2:
        print("usage: python -m jointkv.evaluate.compare.other_environment JOB.json RESULT.jsonl", file=sys.stderr)
        return 2
    from transformers.utils import logging

    logging.disable_progress_bar()  # stderr is for what goes wrong
    try:
        job = read_job(Path(arguments[0]))
        with Path(arguments[1]).open("w") as result:
            for row in run_job(job, progress=lambda line: print(line, flush=True)):
                # A row at a time: a later method may take the whole process down.
                print(json.dumps(asdict(row)), file=result, flush=True)
    except JointKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
