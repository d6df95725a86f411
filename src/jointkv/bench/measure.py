"""One arm under one load, once: drives the server, watches it, and makes a `Run` of what was seen."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import numpy as np

from jointkv.bench.load_generator import LoadFailed, drive, spec_of
from jointkv.bench.load_process import Answer, LoadOutcome
from jointkv.bench.plan import Plan
from jointkv.bench.result import Arm, Latency, Load, RequestSample, Run, Timeline
from jointkv.bench.reuse import Reuse
from jointkv.bench.server import Server, ServerFailed, Step
from jointkv.bench.stored import stored_of
from jointkv.bench.warm import warm_traffic
from jointkv.bench.watch import COMPUTED_PROMPT, DISABLED, DRAFTS, FIRST_TOKENS, GENERATED, Watch
from jointkv.system.machine import allowed_cores, foreign_seconds

PLUGIN_SECONDS = ("compare_seconds", "schedule_seconds", "apply_seconds")


def measure(
    plan: Plan,
    server: Server,
    arm: Arm,
    load: Load,
    number: int,
    progress: Callable[[int], None],
    client_cores: Collection[int] | None = None,
) -> tuple[Run, list[str]]:
    """Send the requests of `plan` to the running `server` of `arm` in round `number`, after those of its warm-up.

    Args:
        progress: called with the number of requests that have ended.
        client_cores: where the load generator runs; anywhere unless given.

    Returns:
        The run, and the texts in the order of the requests.

    Raises:
        LoadFailed: no result, or no request was answered.
        ServerFailed: the server ended, or jointkv is not attached to it or has switched itself off.
    """
    warmup = warm_traffic(plan, server, arm)
    window = _Window(server)
    spec = spec_of(server.url, plan.model, plan.location, load, plan.requests, plan.seed + number - 1)
    try:
        outcome = drive(spec, progress, window, client_cores)
    except LoadFailed:
        server.require_alive(f"under load ({load.label})")
        raise
    server.require_alive(f"under load ({load.label})")
    fusion = window.plugin_counters()
    if arm.fusion is not None and fusion is None:
        raise ServerFailed(f"{arm.name}: the server runs without jointkv, so nothing would be fused")
    if window.readings[-1].metrics.get(DISABLED):
        raise ServerFailed(f"{arm.name}: jointkv switched itself off; {server.log_file} says why")
    timeline = window.timeline(outcome.began)
    inside = _inside(timeline, outcome.seconds)
    reuse = window.reuse()
    # A helper's row in a step is no request of its own.
    steps = [] if reuse is not None and reuse.helpers else window.steps
    pool_bytes = (arm.pool_blocks - 1) * plan.block_bytes[arm.name]
    run = Run(
        arm=arm.name,
        load=load.label,
        round=number,
        position=plan.position(number, arm, load),
        **_answered(outcome),
        **_seen(timeline, inside, steps, outcome.seconds),
        prompt_tokens_computed=window.prompt_tokens_computed(),
        recomputed_tokens=window.recomputed_tokens(),
        kv_bytes_per_running_token=_bytes_per_token(timeline, inside, outcome.complete, pool_bytes),
        plugin_seconds=_plugin_seconds(fusion, reuse),
        server_cpu_seconds=window.server_seconds,
        foreign_cpu=window.foreign_cpu(outcome.cpu_seconds),
        fusion=fusion,
        reuse=reuse,
        warmup=warmup,
        stored=stored_of(arm.fusion, fusion),
        timeline=timeline,
    )
    return run, [answer.text for answer in outcome.answers]


class _Window(Watch):
    """What the machine and the server did from entering to leaving, which is while the load ran."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.url)
        self.server, self.cores = server, allowed_cores()
        self.steps: list[Step] = []

    def __enter__(self) -> Self:
        super().__enter__()
        self._steps_before = len(self.server.steps())
        self._before = self._clocks()
        return self

    def __exit__(self, *exception: object) -> None:
        spent = [after - before for before, after in zip(self._before, self._clocks(), strict=True)]
        self.seconds, self.server_seconds, self._foreign_seconds = spent
        super().__exit__(*exception)
        self.steps = self.server.steps()[self._steps_before :]

    def _clocks(self) -> tuple[float, float, float]:
        """The time, the server's CPU time, and that of the cores without this process; not a number where unknown."""
        foreign = foreign_seconds(self.cores)
        return time.perf_counter(), self.server.cpu_seconds(), math.nan if foreign is None else foreign

    def foreign_cpu(self, load_seconds: float) -> float | None:
        """Part of the cores' time that went to none of: this process, the server, the load generator."""
        spent = self._foreign_seconds - self.server_seconds - load_seconds
        return None if math.isnan(spent) else max(0.0, spent / (self.seconds * len(self.cores)))

    def prompt_tokens_computed(self) -> int | None:
        """All tokens that steps computed, less those of answers; what preemption makes them compute again counts, too.

        The token that a request's last step yields is never computed itself, nor is it known to the engine how many
        of a draft's tokens are wasted, so with speculative decoding there is no such number.
        """
        grown = self.grown()
        if not self.steps or grown.get(DRAFTS):
            return None
        return max(0, sum(step.tokens for step in self.steps) - round(grown[GENERATED] - grown[FIRST_TOKENS]))

    def recomputed_tokens(self) -> int | None:
        """Tokens computed beyond one time each."""
        computed = self.prompt_tokens_computed()
        return None if computed is None else max(0, computed - round(self.grown()[COMPUTED_PROMPT]))


def _plugin_seconds(fusion: Mapping[str, float] | None, reuse: Reuse | None) -> float | None:
    """All its parts; None without it."""
    if fusion is None:
        return None
    return sum(fusion[name] for name in PLUGIN_SECONDS) + (reuse.plan_seconds if reuse is not None else 0.0)


def _answered(outcome: LoadOutcome) -> dict[str, Any]:
    """The fields of a `Run` that the client saw."""
    done = outcome.complete
    tpot = [(answer.e2el - answer.ttft) / (answer.output_tokens - 1) for answer in done if answer.output_tokens > 1]
    itl = list(itertools.chain.from_iterable(answer.itls for answer in done))
    return {
        "seconds": outcome.seconds,
        "completed": len(done),
        "failed": len(outcome.answers) - len(done),
        "prompt_tokens": sum(answer.prompt_tokens for answer in done),
        "output_tokens": sum(answer.output_tokens for answer in done),
        "output_tokens_per_s": outcome.output_tokens_per_s,
        "total_tokens_per_s": outcome.total_tokens_per_s,
        "requests_per_s": outcome.requests_per_s,
        "ttft": _latency([answer.ttft for answer in done]),
        "tpot": _latency(tpot) if tpot else None,
        "itl": _latency(itl) if itl else None,
        "e2el": _latency([answer.e2el for answer in done]),
        "requests": [answer.model_dump(include=set(RequestSample.model_fields)) for answer in done],
    }


def _seen(timeline: Timeline, inside: Sequence[int], steps: Sequence[Step], seconds: float) -> dict[str, Any]:
    """The fields of a `Run` that the server tells; means of metrics are over the readings `inside` the run.

    How many requests run is taken from the steps where they are known: the metric shows, for as long as a step takes,
    how many were left after the one before.
    """

    def mean(values: Sequence[float]) -> float:
        return float(np.mean([values[number] for number in inside]))

    return {
        "running_peak": max((float(step.requests) for step in steps), default=max(timeline.running)),
        "running_mean": sum(step.requests * step.seconds for step in steps) / seconds
        if steps
        else mean(timeline.running),
        "waiting_peak": max(timeline.waiting),
        "waiting_mean": mean(timeline.waiting),
        "preemptions": round(timeline.preemptions[-1]),
        "pool_usage_peak": max(timeline.pool_usage),
        "pool_usage_mean": mean(timeline.pool_usage),
        "pages_freed": None if timeline.pages_freed is None else round(timeline.pages_freed[-1]),
    }


def _inside(timeline: Timeline, seconds: float) -> list[int]:
    """Which readings are from the run itself; all of them where it was over before the first one."""
    between = range(1, len(timeline.seconds) - 1)
    return [number for number in between if timeline.seconds[number] <= seconds] or list(range(len(timeline.seconds)))


def _bytes_per_token(
    timeline: Timeline, inside: Sequence[int], answers: Sequence[Answer], pool_bytes: int
) -> float | None:
    """Bytes of the pages in use over the tokens that running requests hold; an estimate for the tokens.

    The server says how many requests run, the client which ones have been answered how far. Where fewer run than are
    being answered, some were preempted: an equal share of the tokens is taken. Where more run, the others are in
    prefill and count with half a prompt each.
    """
    used = held = 0.0
    prompt = float(np.mean([answer.prompt_tokens for answer in answers]))
    for number in inside:
        now, running = timeline.seconds[number], timeline.running[number]
        tokens = [_tokens_at(answer, now) for answer in answers if answer.ttft < now - answer.start < answer.e2el]
        share = min(1.0, running / len(tokens)) if tokens else 0.0
        in_prefill = max(0.0, running - len(tokens))
        held += share * sum(tokens) + in_prefill * prompt / 2
        used += timeline.pool_usage[number] * pool_bytes
    return used / held if held else None


def _tokens_at(answer: Answer, now: float) -> float:
    """Prompt and answer so far, of a request that is being answered at `now` seconds after the first one."""
    part = (now - answer.start - answer.ttft) / (answer.e2el - answer.ttft)
    return answer.prompt_tokens + part * answer.output_tokens


def _latency(values: Sequence[float]) -> Latency:
    p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
    return Latency(mean=float(np.mean(values)), p50=p50, p95=p95, p99=p99)
