"""Comparison across environments: methods whose packages are not installed here run in a process of another one.

`python -m jointkv.evaluate.compare.other_environment JOB.json RESULT.jsonl` is that process. It reads a job, writes one
row per line, and prints a line of progress before each method.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal, Self

from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from jointkv.errors import BadInput, JointKVError
from jointkv.evaluate.compare.comparison import Wanted, not_run, run_methods
from jointkv.evaluate.compare.result import MethodRow
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.jsonl import located, validated
from jointkv.evaluate.methods import get_method
from jointkv.evaluate.progress import Report
from jointkv.evaluate.traffic.base import Request
from jointkv.system import guard

STDERR_LINES = 3
SILENCE_SECONDS = 1800.0
"""A worker that prints nothing for so long is ended; it prints a line before each method."""


class Job(BaseModel):
    """A comparison for another process.

    Attributes:
        model: the model's folder.
        requests: token ids of prompt and continuation.
        methods: names and levels.
    """

    format: Literal["jointkv.methods.job/1"] = "jointkv.methods.job/1"
    model: str
    dtype: str
    block_size: int = Field(ge=1)
    traffic: str
    generate: int = Field(ge=0)
    requests: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    methods: tuple[tuple[str, float], ...]

    @classmethod
    def of(
        cls, batch: Batch, wanted: Sequence[Wanted], model_folder: str | Path, traffic: str = "", generate: int = 0
    ) -> Self:
        """The job of running `wanted` on `batch`, whose model is in `model_folder`."""
        return cls(
            model=str(model_folder),
            dtype=str(batch.model.dtype).removeprefix("torch."),
            block_size=batch.block_size,
            traffic=traffic,
            generate=generate,
            requests=tuple((request.prompt, request.continuation) for request in batch.requests),
            methods=tuple((method.name, level) for method, level in wanted),
        )


def compare_methods(
    batch: Batch,
    wanted: Sequence[Wanted],
    *,
    model_folder: str | Path,
    worker_python: str | Path | None = None,
    traffic: str = "",
    generate: int = 0,
    progress: Report | None = None,
    silence_seconds: float = SILENCE_SECONDS,
) -> list[MethodRow]:
    """Rows for `wanted`, in that order: those whose packages are here run here, the others in `worker_python`.

    Each is compared with the unfused model of the environment it ran in. `model_folder` holds the model of `batch`, for
    the worker to load; `worker_python` is the interpreter of the other environment (`make setup-eval`), whose process
    is ended when it prints nothing for `silence_seconds`. What could not be run has a row that says why. What `batch`
    has prefilled is released before a worker starts, which needs the memory for its own.
    """
    here = [each for each in wanted if not each[0].missing_packages()]
    elsewhere = [each for each in wanted if each not in here]
    rows = list(run_methods(batch, here, generate, progress, traffic=traffic)) if here else []
    if elsewhere:
        job = Job.of(batch, elsewhere, model_folder, traffic, generate)
        batch.release()
        rows += run_elsewhere(job, elsewhere, worker_python, progress, silence_seconds)
    found = dict(zip(here + elsewhere, rows, strict=True))
    return [found[each] for each in wanted]


def run_elsewhere(
    job: Job,
    wanted: Sequence[Wanted],
    python: str | Path | None,
    progress: Report | None = None,
    silence_seconds: float = SILENCE_SECONDS,
) -> list[MethodRow]:
    """Run `job` under the interpreter `python`. Where that fails, rows that say why follow those that were made."""
    rows: list[MethodRow] = []
    reason = f"no environment of the baselines at {python}; run: make setup-eval"
    if python is not None and Path(python).is_file():
        with tempfile.TemporaryDirectory(prefix="jointkv-methods-") as folder:
            job_file, result, errors = (Path(folder) / name for name in ("job.json", "result.jsonl", "stderr"))
            job_file.write_text(job.model_dump_json())
            command = [str(python), "-m", "jointkv.evaluate.compare.other_environment", str(job_file), str(result)]
            try:
                with errors.open("w") as stderr:
                    code = _follow(command, stderr, progress or (lambda line: None), silence_seconds)
                reason = f"the worker ended with exit code {code}"
                if code is None:
                    reason = f"the worker was ended after {silence_seconds:g} s without output"
                rows = read_rows(result) if result.is_file() else []
            except OSError as error:
                reason = f"the worker {python} could not be started: {error}"
            except BadInput as error:
                reason = f"{error}; {reason}"
            if last := errors.read_text(errors="replace").strip().splitlines()[-STDERR_LINES:]:
                reason = f"{reason}: {' | '.join(last)}"
    return rows + [not_run(method, level, reason, job.traffic) for method, level in wanted[len(rows) :]]


def _follow(command: Sequence[str], errors: IO[str], progress: Report, silence_seconds: float) -> int | None:
    """Run `command` and report its lines; its exit code, or None when it was ended for silence.

    Whatever is raised here, such as a KeyboardInterrupt, ends the process and those that it started.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    assert process.stdout is not None
    rest = b""
    try:
        with process.stdout as stdout:
            while select.select([stdout], [], [], silence_seconds)[0]:
                read = os.read(stdout.fileno(), 1 << 16)
                if not read:
                    return process.wait()
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    progress(line.decode(errors="replace").rstrip())
        return None
    finally:
        if process.poll() is None:
            guard.kill(process.pid)
            process.wait()


def read_rows(path: Path) -> list[MethodRow]:
    """What a worker has written, without the part of a line that one may leave that dies. Raises `BadInput`."""
    with located(f"{path.name} is not what a worker writes"):
        return [validated(MethodRow.model_validate_json, line) for line in path.read_bytes().split(b"\n")[:-1]]


def read_job(path: Path) -> Job:
    """A job from a file. Raises `BadInput`."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error}") from None
    with located(f"{path}: the job is malformed"):
        return validated(Job.model_validate_json, text)


def run_job(job: Job, progress: Report | None = None) -> Iterator[MethodRow]:
    """Load the model of `job` and run its methods.

    Raises `BadInput` for a method that is unknown, or a model that cannot be loaded.
    """
    wanted = [(get_method(name), level) for name, level in job.methods]
    try:
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype, trust_remote_code=False).eval()
    except Exception as error:  # transformers checks little of what it reads
        raise BadInput(f"cannot load the model {job.model}: {type(error).__name__}: {error}") from error
    requests = [Request(prompt, continuation, "") for prompt, continuation in job.requests]
    return run_methods(Batch(model, requests, job.block_size), wanted, job.generate, progress, traffic=job.traffic)


def main(arguments: Sequence[str]) -> int:
    """Run the job of the file `arguments[0]`, write its rows to `arguments[1]`."""
    if len(arguments) != 2:
        print("usage: python -m jointkv.evaluate.compare.other_environment JOB.json RESULT.jsonl", file=sys.stderr)
        return 2
    logging.disable_progress_bar()  # stderr is for what goes wrong
    try:
        job = read_job(Path(arguments[0]))
        with Path(arguments[1]).open("w") as result:
            for row in run_job(job, progress=lambda line: print(line, flush=True)):
                # A row at a time: a later method may take the whole process down.
                print(row.model_dump_json(), file=result, flush=True)
    except JointKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
