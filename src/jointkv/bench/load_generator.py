"""vLLM's own load generator, `vllm.benchmarks`, in a process of its own.

Run as `python -m jointkv.bench.load_generator`. The first line of stdin is the `Spec` as JSON, answered with
`{"ready": true}` once everything is imported; the second starts the load. `{"finished": n}` follows as requests end,
then `{"outcome": ...}` or `{"error": ...}`. The process ends when stdin is closed, and so with the one that started it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import IO, Any

from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Load
from jointkv.errors import BadInput, JointKVError
from jointkv.system.machine import allowed_cores, on_cores

COMMAND = (sys.executable, "-P", "-m", "jointkv.bench.load_generator")
BACKEND = "jointkv"
LOG_LINES = 3
SHUTDOWN_SECONDS = 10.0
TOTALS = ("duration", "completed", "failed", "request_throughput", "output_throughput", "total_token_throughput")
SPREADS = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50.0, 95.0, 99.0)


class LoadFailed(JointKVError, RuntimeError):
    """The load generator ended without a result, or no request was answered. The message ends with the reason."""


@dataclass(frozen=True)
class Spec:
    """What the process is told. `requests` are `(prompt, output tokens, seconds after the start)`."""

    url: str
    model: str
    tokenizer: str
    requests: list[tuple[list[int], int, float | None]]
    rate: float | None
    burstiness: float
    concurrency: int | None
    seed: int


@dataclass(frozen=True)
class Answer:
    """How one request went. Times in seconds; `start` counts from the first request that was sent.

    Attributes:
        itls: gaps between the parts of the answer as they arrived, mostly one token each.
        error: why there is no complete answer; None where there is.
    """

    start: float
    prompt_tokens: int
    output_tokens: int
    ttft: float
    itls: list[float]
    e2el: float
    text: str
    error: str | None


@dataclass(frozen=True)
class LoadOutcome:
    """What came out of one load.

    Attributes:
        began: when the first request was sent, on the clock of `time.perf_counter`, which processes share.
        answers: in the order of the requests.
        cpu_seconds: of the load generator while it ran.
        totals: vLLM's own numbers: `TOTALS`, and mean and percentiles in ms of `SPREADS`.
    """

    began: float
    answers: list[Answer]
    cpu_seconds: float
    totals: dict[str, float]


def drive(
    url: str,
    model: str,
    tokenizer: str,
    load: Load,
    requests: Sequence[ServingRequest],
    seed: int,
    progress: Callable[[int], None],
    during: AbstractContextManager[object] | None = None,
    cores: Collection[int] | None = None,
) -> LoadOutcome:
    """Send `requests` to the server at `url` as `load` says. The process that does it ends with this call.

    Args:
        model: the name it is served under.
        tokenizer: a folder or hub name.
        seed: of the arrivals; the same seed sends at the same times.
        progress: called with the number of requests that have ended, whenever it grows.
        during: entered just before the first request is sent and left right after the last one has ended.
        cores: where it runs; anywhere unless given.

    Raises:
        BadInput: no requests, or a replay of requests without timestamps.
        LoadFailed: there is no result, or not one complete answer in it.
    """
    order, spec = _spec(url, model, tokenizer, load, requests, seed)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        environment = {**os.environ, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        with on_cores(cores or allowed_cores()):
            process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
            )
        try:
            answer = _converse(process, spec, progress, during or nullcontext())
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(SHUTDOWN_SECONDS)
        finally:
            process.kill()
            process.wait()
        if "outcome" not in answer:
            raise LoadFailed(f"the load generator failed: {answer.get('error') or _last_lines(log)}")
    return _outcome(answer["outcome"], order)


def _spec(
    url: str, model: str, tokenizer: str, load: Load, requests: Sequence[ServingRequest], seed: int
) -> tuple[list[int], Spec]:
    """The spec, and which request stands where in it: vLLM replays a log in order only."""
    if not requests:
        raise BadInput("there are no requests to send")
    order = list(range(len(requests)))
    times: list[float | None] = [None] * len(requests)
    if load.kind == "replay":
        given = [request.timestamp for request in requests if request.timestamp is not None]
        if len(given) < len(requests):
            raise BadInput("a replay needs a timestamp for every request")
        order.sort(key=lambda number: given[number])
        times = [(given[number] - given[order[0]]) / (load.speed or 1.0) for number in order]
    sent = [
        (list(requests[number].prompt), requests[number].output_tokens, at)
        for number, at in zip(order, times, strict=True)
    ]
    return order, Spec(url, model, tokenizer, sent, load.rate, load.burstiness or 1.0, load.concurrency, seed)


def _converse(
    process: subprocess.Popen[str], spec: Spec, progress: Callable[[int], None], during: AbstractContextManager[object]
) -> dict[str, Any]:
    """Hand over the spec, start, and read lines until the result, the error or the end."""
    try:
        message = _say(process, json.dumps(asdict(spec)))
        if "ready" not in message:
            return message
        with during:
            message = _say(process, "go")
            while "finished" in message:
                progress(message["finished"])
                message = _hear(process)
        return message
    except BrokenPipeError:
        return {}


def _say(process: subprocess.Popen[str], line: str) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return _hear(process)


def _hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    return dict(json.loads(line)) if line else {}


def _outcome(found: dict[str, Any], order: Sequence[int]) -> LoadOutcome:
    """`found` in the order of the requests. Raises `LoadFailed` where nothing was answered."""
    answers: list[Any] = [None] * len(order)
    for number, answer in zip(order, found.pop("answers"), strict=True):
        answers[number] = Answer(**answer)
    if all(answer.error is not None for answer in answers):
        raise LoadFailed(f"no request was answered completely; the first one: {answers[0].error}")
    return LoadOutcome(answers=answers, **found)


def _last_lines(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return " | ".join(lines[-LOG_LINES:]) or "it ended without a word"


def generate(spec: Spec, notify: Callable[[dict[str, Any]], None], wait: Callable[[], object]) -> dict[str, Any]:
    """Import vLLM, wait, send everything; returns `LoadOutcome` as a dictionary."""
    import numpy as np
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS, async_request_openai_completions
    from vllm.tokenizers import get_tokenizer

    finished = 0

    async def counted(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        nonlocal finished
        output = await async_request_openai_completions(request_func_input, session, pbar)
        finished += 1
        notify({"finished": finished})
        return output

    # A backend of our own beside vLLM's, which is theirs and counts: the only progress theirs knows is a bar.
    ASYNC_REQUEST_FUNCS[BACKEND] = counted
    samples = [
        SampleRequest(prompt=prompt, prompt_len=len(prompt), expected_output_len=output_tokens, timestamp=at)
        for prompt, output_tokens, at in spec.requests
    ]
    tokenizer = get_tokenizer(spec.tokenizer)
    random.seed(spec.seed)
    np.random.seed(spec.seed)
    notify({"ready": True})
    wait()
    cpu = time.process_time()
    found = asyncio.run(
        serve.benchmark(
            task_type=serve.TaskType.GENERATION,
            endpoint_type=BACKEND,
            api_url=f"{spec.url}/v1/completions",
            base_url=spec.url,
            model_id=spec.model,
            model_name=spec.model,
            tokenizer=tokenizer,
            input_requests=samples,
            logprobs=None,
            request_rate=spec.rate or float("inf"),
            burstiness=spec.burstiness,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=list(SPREADS),
            selected_percentiles=list(PERCENTILES),
            ignore_eos=True,
            goodput_config_dict={},
            max_concurrency=spec.concurrency,
            lora_modules=None,
            extra_headers=None,
            extra_body={"temperature": 0.0},
            ready_check_timeout_sec=0,
            self_timed=samples[0].timestamp is not None,
        )
    )
    return {"cpu_seconds": time.process_time() - cpu, **_readable(found, [sample[1] for sample in spec.requests])}


def _readable(found: dict[str, Any], expected: Sequence[int]) -> dict[str, Any]:
    """vLLM's result by request. One that ended before its last token counts as failed here; vLLM lets it pass."""
    began = min(found["start_times"])
    answers = []
    for number, error in enumerate(found["errors"]):
        tokens = found["output_lens"][number]
        if not error and tokens != expected[number]:
            error = f"{tokens} of {expected[number]} tokens came"
        answer = Answer(
            start=found["start_times"][number] - began,
            prompt_tokens=found["input_lens"][number],
            output_tokens=tokens,
            ttft=found["ttfts"][number],
            itls=found["itls"][number],
            e2el=found["latencies"][number],
            text=found["generated_texts"][number],
            error=error.strip().splitlines()[-1] if error else None,
        )
        answers.append(asdict(answer))
    totals = {name: float(value) for name, value in found.items() if name in TOTALS or name.endswith("_ms")}
    return {"began": began, "answers": answers, "totals": totals}


def main() -> int:
    """Read a `Spec`, send, answer on stdout; returns the exit code."""
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
        notify({"outcome": generate(Spec(**json.loads(sys.stdin.readline())), notify, wait)})
    except Exception as error:
        notify({"error": f"{type(error).__name__}: {error}"})
        raise
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
