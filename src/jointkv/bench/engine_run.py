"""One arm, once, in one process: build vLLM's engine, submit all requests at once, step until done, measure.

Run as `python -m jointkv.bench.engine_run`, with an `EngineRun` as JSON on stdin. Every line written to stdout is a
JSON object: `{"finished": n}` as requests finish, then `{"measured": ...}` or `{"error": ...}`. The environment has to
be prepared by the caller, see `jointkv.bench.launch`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from jointkv.errors import JointKVError
from jointkv.system.machine import allowed_cores, foreign_seconds

WARM_UP_REQUESTS = 4
WARM_UP_PROMPT_TOKENS = 40
WARM_UP_OUTPUT_TOKENS = 8

Notify = Callable[[dict[str, Any]], None]


class EngineFault(JointKVError, RuntimeError):
    """The engine did not do what this benchmark is about. The message says what."""


@dataclass(frozen=True)
class EngineRun:
    """What one process measures.

    Attributes:
        prompts: token ids of every request, submitted together.
        output_tokens: generated for every request, whatever end tokens come up.
        pool_blocks: blocks of the KV pool; the engine keeps one of them as its null block.
        fusion: options of `PluginSettings`; None leaves the plugin out of the engine.
    """

    model: str
    prompts: list[list[int]]
    output_tokens: int
    pool_blocks: int
    block_size: int
    max_running: int
    max_batched_tokens: int
    dtype: str
    seed: int
    fusion: dict[str, Any] | None


@dataclass(frozen=True)
class Measured:
    """What came out of an `EngineRun`. Times in seconds; None stands for "not measured".

    Attributes:
        seconds: from the first submission to the last token.
        prompt_tokens_per_s: all prompt tokens over the time until the last request has its first token.
        max_running: requests that ran in one step at the most.
        ttft_p50: median over requests of the time from submission to the first token.
        itl_p50: median over requests of their mean time between tokens.
        execute_seconds: inside the executor, that is the model and, with fusion, the comparing.
        foreign_cpu: fraction of the cores' time that went to other processes; a quiet machine has nearly 0.
        peak_pool_usage: largest fraction of the pool in use after a step.
        pages_freed: given back to the pool by merging; None without the plugin.
        fusion: the plugin's counters over the measured part; None without the plugin.
        startup_seconds: building the engine and warming it up; in no other number.
        outputs: per request its output token ids, separated by spaces.
    """

    seconds: float
    output_tokens: int
    tokens_per_s: float
    prompt_tokens: int
    prompt_tokens_per_s: float
    steps: int
    max_running: int
    preemptions: int
    ttft_p50: float
    ttft_max: float
    itl_p50: float | None
    execute_seconds: float | None
    foreign_cpu: float | None
    peak_pool_usage: float
    pages_freed: int | None
    fusion: dict[str, Any] | None
    startup_seconds: float
    outputs: list[str]


def measure(run: EngineRun, notify: Notify) -> Measured:
    """Build the engine of `run`, warm it up and measure.

    Raises:
        EngineFault: the plugin is not attached or has switched itself off, or the engine stalls.
    """
    start = time.perf_counter()
    engine = _build(run)
    scheduler = engine.engine_core.engine_core.scheduler
    if run.fusion is not None and scheduler.connector is None:
        raise EngineFault("the engine started without jointkv's connector, so nothing would be fused")
    engine.collective_rpc(_touch_pool)
    _warm_up(engine, run)
    before = _statistics(scheduler)
    clock = _time_execution(engine)
    startup_seconds = time.perf_counter() - start

    trace = _Trace(engine, scheduler)
    for number, prompt in enumerate(run.prompts):
        trace.submit(str(number), prompt, run.output_tokens)
    trace.drain(notify)
    after = _statistics(scheduler)
    if after is not None and after.get("faults"):
        raise EngineFault("jointkv switched itself off during the run; its log says why")
    return trace.summarise(startup_seconds, clock, _difference(before, after))


class _Trace:
    """Submits requests, steps the engine and keeps the time of every token."""

    def __init__(self, engine: Any, scheduler: Any) -> None:
        self.engine, self.scheduler = engine, scheduler
        self.pool = scheduler.kv_cache_manager.block_pool
        self.requests: dict[str, Any] = {}
        self.submitted: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.tokens: dict[str, list[int]] = {}
        self.prompt_tokens = self.steps = self.max_running = 0
        self.peak_pool_usage = 0.0
        self.cores = allowed_cores()
        self.foreign_before = foreign_seconds(self.cores)

    def submit(self, name: str, prompt: Sequence[int], output_tokens: int) -> None:
        self.submitted[name] = time.perf_counter()
        self.prompt_tokens += len(prompt)
        self.tokens[name] = []
        inner = self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, _sampling(output_tokens))
        # The scheduler forgets a request when it finishes; its count of preemptions is read after that.
        self.requests[name] = self.scheduler.requests[inner]

    def drain(self, notify: Notify | None) -> None:
        """Step until every request has finished. Raises `EngineFault` when the starting process is gone."""
        parent, finished = os.getppid(), 0
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            self.steps += 1
            done = 0
            for output in outputs:
                done += output.finished
                token_ids = output.outputs[0].token_ids
                if token_ids:
                    self.first.setdefault(output.request_id, now)
                    self.last[output.request_id] = now
                    self.tokens[output.request_id].extend(token_ids)
            # Requests that finished in this step have left `running`, and ran in it all the same.
            self.max_running = max(self.max_running, len(self.scheduler.running) + done)
            self.peak_pool_usage = max(self.peak_pool_usage, self.pool.get_usage())
            finished += done
            if done and notify is not None:
                notify({"finished": finished})
            if os.getppid() != parent:
                raise EngineFault("the process that started this run is gone")

    def summarise(self, startup: float, clock: list[float] | None, fusion: dict[str, Any] | None) -> Measured:
        start = min(self.submitted.values())
        foreign_cpu = None
        if self.foreign_before is not None and (foreign := foreign_seconds(self.cores)) is not None:
            share = (foreign - self.foreign_before) / ((time.perf_counter() - start) * len(self.cores))
            foreign_cpu = max(0.0, share)
        seconds = max(self.last.values()) - start
        output_tokens = sum(len(tokens) for tokens in self.tokens.values())
        ttft = [self.first[name] - submitted for name, submitted in self.submitted.items()]
        gaps = [
            (self.last[name] - self.first[name]) / (len(tokens) - 1)
            for name, tokens in self.tokens.items()
            if len(tokens) > 1
        ]
        return Measured(
            seconds=seconds,
            output_tokens=output_tokens,
            tokens_per_s=output_tokens / seconds,
            prompt_tokens=self.prompt_tokens,
            prompt_tokens_per_s=self.prompt_tokens / (max(self.first.values()) - start),
            steps=self.steps,
            max_running=self.max_running,
            preemptions=sum(request.num_preemptions for request in self.requests.values()),
            ttft_p50=median(ttft),
            ttft_max=max(ttft),
            itl_p50=median(gaps) if gaps else None,
            execute_seconds=sum(clock) if clock is not None else None,
            foreign_cpu=foreign_cpu,
            peak_pool_usage=self.peak_pool_usage,
            pages_freed=None if fusion is None else fusion.get("pages_freed"),
            fusion=fusion,
            startup_seconds=startup,
            outputs=[" ".join(map(str, tokens)) for tokens in self.tokens.values()],
        )


def _build(run: EngineRun) -> Any:
    from vllm import EngineArgs
    from vllm.config import KVTransferConfig
    from vllm.v1.engine.llm_engine import LLMEngine

    from jointkv.vllm_plugin import engine_args

    plugin: dict[str, Any] = {}
    if run.fusion is not None:
        plugin = engine_args(**run.fusion)
        plugin["kv_transfer_config"] = KVTransferConfig(**plugin["kv_transfer_config"])
    arguments = EngineArgs(
        model=run.model,
        dtype=run.dtype,
        seed=run.seed,
        # The pool holds fewer tokens than the longest context of most models.
        max_model_len=max(map(len, run.prompts)) + run.output_tokens,
        max_num_seqs=run.max_running,
        max_num_batched_tokens=max(run.max_batched_tokens, run.max_running),
        block_size=run.block_size,
        num_gpu_blocks_override=run.pool_blocks,
        enable_prefix_caching=True,
        enforce_eager=True,
        disable_log_stats=True,
        **plugin,
    )
    return LLMEngine.from_engine_args(arguments)


def _sampling(output_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=output_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _touch_pool(worker: Any) -> None:
    """Write the whole pool once: the first write to memory is slow, and the arms' pools differ in size."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def _warm_up(engine: Any, run: EngineRun) -> None:
    """Serve a few short requests that share nothing with the measured ones, then forget them."""
    scheduler = engine.engine_core.engine_core.scheduler
    trace = _Trace(engine, scheduler)
    length = min(WARM_UP_PROMPT_TOKENS, max(map(len, run.prompts)))
    output_tokens = min(WARM_UP_OUTPUT_TOKENS, run.output_tokens)
    source = [token for prompt in run.prompts for token in reversed(prompt)]
    for number in range(WARM_UP_REQUESTS):
        offset = (number * length) % max(1, len(source) - length)
        trace.submit(f"warm-up {number}", source[offset : offset + length], output_tokens)
    trace.drain(None)
    if not engine.reset_prefix_cache(reset_connector=scheduler.connector is not None):
        raise EngineFault("the prefix cache could not be emptied after the warm-up: pages are still in use")


def _time_execution(engine: Any) -> list[float] | None:
    """Collects the seconds of every call of the executor; None where the executor works elsewhere meanwhile."""
    executor = engine.model_executor
    if type(executor).__name__ != "UniProcExecutor":
        return None
    seconds: list[float] = []

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - start)

        return call

    executor.execute_model = timed(executor.execute_model)
    executor.sample_tokens = timed(executor.sample_tokens)
    return seconds


def _statistics(scheduler: Any) -> dict[str, Any] | None:
    report = getattr(scheduler.connector, "statistics", None)
    return None if report is None else dict(report())


def _difference(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any] | None:
    """Counters of `after` less those of `before`, which hold the warm-up; other entries as they are after."""
    if before is None or after is None:
        return after
    result: dict[str, Any] = {}
    for name, value in after.items():
        if isinstance(value, dict):
            result[name] = _difference(before.get(name, {}), value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            result[name] = value - before.get(name, 0)
        else:
            result[name] = value
    return result


def main() -> int:
    """Read an `EngineRun` from stdin, measure, answer on stdout; returns the exit code."""
    # Whatever vLLM prints goes to stderr, so that stdout carries nothing but this program's own lines.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def notify(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    try:
        notify({"measured": asdict(measure(EngineRun(**json.load(sys.stdin)), notify))})
    except JointKVError as error:
        notify({"error": str(error)})
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
