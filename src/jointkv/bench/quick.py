"""The quick A/B: arms, what a run is, medians over repeats, ratios within a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from jointkv.bench.engine_run import EngineRun, Measured
from jointkv.bench.launch import EngineRunFailed
from jointkv.bench.schedule import Watcher, about, round_order, seconds_left
from jointkv.errors import BadInput
from jointkv.vllm_plugin.settings import PluginSettings

FORMAT = "jointkv.bench.quick/1"
BLOCK_MULTIPLE = 16
LARGE_POOL_FACTOR = 8
QUIET = 0.05
"""Above this fraction of the cores' time in other processes a run is reported as disturbed."""
REFERENCE = "stock_large_pool"
METRICS = (
    "tokens_per_s",
    "max_running",
    "steps",
    "preemptions",
    "ttft_p50",
    "itl_p50",
    "pages_freed",
    "prompt_tokens_per_s",
    "ttft_max",
    "seconds",
    "execute_seconds",
    "foreign_cpu",
    "peak_pool_usage",
)
RATIOS = ("tokens_per_s", "max_running", "steps", "ttft_p50", "itl_p50")


@dataclass(frozen=True)
class Arm:
    """One way to serve the requests: a pool of `pool_factor` times the blocks asked for, with or without fusion."""

    name: str
    pool_factor: int
    fused: bool


ARMS = (
    Arm("stock", 1, fused=False),
    Arm("fused", 1, fused=True),
    Arm(REFERENCE, LARGE_POOL_FACTOR, fused=False),
)
COMPARISONS = (("fused", "stock"), ("fused", REFERENCE), ("stock", REFERENCE))


@dataclass(frozen=True)
class QuickSettings:
    """What is run. The defaults put about nine requests of near-prefix traffic into the pool of the stock engine.

    Attributes:
        output_tokens: generated for every request.
        pool_blocks: of the arms `stock` and `fused`.
        dtype: of the model and its KV cache.
        max_running: requests the engine may run at once.
        max_batched_tokens: tokens the engine may compute in one step.
        seed: of the requests of the first round; every later round takes the next one.
        fusion: options of `PluginSettings` for the arm `fused`.
    """

    model: str = "smollm2"
    traffic: str = "near_prefix"
    requests: int = 48
    output_tokens: int = 96
    pool_blocks: int = 200
    block_size: int = 32
    repeats: int = 3
    arms: tuple[str, ...] = tuple(arm.name for arm in ARMS)
    max_running: int = 64
    max_batched_tokens: int = 2048
    dtype: str = "bfloat16"
    seed: int = 0
    fusion: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One arm in one round. `outputs_equal` counts requests answered as by `stock_large_pool` in the same round."""

    arm: str
    round: int
    seed: int
    measured: Measured
    outputs_equal: int | None = None

    def value(self, metric: str) -> float | None:
        """The metric of that name, one of `METRICS`; None if it was not measured."""
        found: float | None = getattr(self.measured, metric)
        return found


@dataclass(frozen=True)
class ArmSummary:
    """Medians, smallest and largest values over the rounds by metric; None for what was not measured."""

    arm: str
    pool_blocks: int
    rounds: int
    medians: dict[str, float | None]
    ranges: dict[str, tuple[float, float] | None]
    requests: int
    outputs_equal_to_large_pool: float | None


def choose_arms(names: Sequence[str]) -> tuple[Arm, ...]:
    """The arms called `names`, each once, in the order of reports. Raises `BadInput` for an unknown name."""
    known = [arm.name for arm in ARMS]
    for name in names:
        if name not in known:
            raise BadInput(f"unknown arm {name!r}; known: {', '.join(known)}")
    return tuple(arm for arm in ARMS if arm.name in names)


def pool_blocks(settings: QuickSettings, arm: Arm) -> int:
    """Blocks of the pool of `arm`. With layer groups a block holds fewer layers: the same bytes are more blocks."""
    groups = PluginSettings.parse(dict(settings.fusion)).layer_groups if arm.fused else 1
    return settings.pool_blocks * arm.pool_factor * groups


def check_fit(settings: QuickSettings, prompts: Sequence[Sequence[int]], max_tokens: int | None) -> None:
    """Raises `BadInput` when the longest request fits neither the pool nor the model, or blocks have an odd size."""
    if settings.block_size % BLOCK_MULTIPLE:
        raise BadInput(f"block_size: vLLM wants a multiple of {BLOCK_MULTIPLE}, got {settings.block_size}")
    longest = max(map(len, prompts)) + settings.output_tokens
    if max_tokens is not None and longest > max_tokens:
        raise BadInput(f"the longest request takes {longest} tokens with its output; the model reads {max_tokens}")
    needed = -(-longest // settings.block_size) + 1
    if needed > settings.pool_blocks:
        raise BadInput(
            f"pool_blocks: the longest request takes {longest} tokens with its output and so a pool of at least "
            f"{needed} blocks of {settings.block_size}, one of which vLLM keeps; got {settings.pool_blocks}"
        )


def run_quick(
    settings: QuickSettings,
    location: str,
    rounds: Sequence[list[list[int]]],
    launch: Callable[[str, EngineRun, Callable[[int], None]], Measured],
    watcher: Watcher,
) -> list[Sample]:
    """Run every arm once per round, interleaved.

    Args:
        location: the model's folder or hub name.
        rounds: for each round the prompts of its requests, the same in every arm.
        launch: measures a run, given a name for its log and a callback for the number of finished requests.

    Raises:
        EngineRunFailed: a run failed; the message names arm and round.
    """
    arms = choose_arms(settings.arms)
    schedule = [(number, arm) for number in range(len(rounds)) for arm in round_order(arms, number)]
    samples: list[Sample] = []
    spent: dict[str, list[float]] = {}
    for position, (number, arm) in enumerate(schedule):
        prompts = rounds[number]
        left = seconds_left(spent, [later.name for _, later in schedule[position:]])
        title = f"round {number + 1} of {len(rounds)}, {arm.name}"
        watcher.start(title + ("" if left is None else f"; {about(left)} left"))
        run = EngineRun(
            model=location,
            prompts=prompts,
            output_tokens=settings.output_tokens,
            pool_blocks=pool_blocks(settings, arm),
            block_size=settings.block_size,
            max_running=settings.max_running,
            max_batched_tokens=settings.max_batched_tokens,
            dtype=settings.dtype,
            seed=settings.seed + number,
            fusion=dict(settings.fusion) if arm.fused else None,
        )
        start = time.monotonic()
        try:
            measured = launch(f"{arm.name}-{number + 1}", run, lambda done: watcher.part(done / settings.requests))
        except EngineRunFailed as error:
            raise EngineRunFailed(f"arm {arm.name} failed in round {number + 1}: {error}") from error
        spent.setdefault(arm.name, []).append(time.monotonic() - start)
        samples.append(Sample(arm.name, number + 1, settings.seed + number, measured))
        if measured.foreign_cpu is not None and measured.foreign_cpu > QUIET:
            watcher.say(
                f"{title}: other processes took {measured.foreign_cpu:.0%} of the cores; times of this run mislead"
            )
        watcher.say(
            f"{title}: {measured.tokens_per_s:.0f} tokens/s, at most {measured.max_running} running, "
            f"{measured.steps} steps, {measured.preemptions} preemptions"
        )
    return compare_outputs(samples)


def compare_outputs(samples: Sequence[Sample]) -> list[Sample]:
    """`samples` with their number of requests answered as by the large pool; None in rounds without that arm."""
    references = {sample.round: sample.measured.outputs for sample in samples if sample.arm == REFERENCE}
    compared = []
    for sample in samples:
        equal = None
        if sample.round in references:
            pairs = zip(sample.measured.outputs, references[sample.round], strict=True)
            equal = sum(ours == theirs for ours, theirs in pairs)
        compared.append(Sample(sample.arm, sample.round, sample.seed, sample.measured, equal))
    return compared


def summarise(settings: QuickSettings, samples: Sequence[Sample]) -> list[ArmSummary]:
    """One summary per arm, in the order of reports."""
    summaries = []
    for arm in choose_arms(settings.arms):
        own = [sample for sample in samples if sample.arm == arm.name]
        values = {metric: _known([sample.value(metric) for sample in own]) for metric in METRICS}
        equal = _known([sample.outputs_equal for sample in own])
        summaries.append(
            ArmSummary(
                arm=arm.name,
                pool_blocks=pool_blocks(settings, arm),
                rounds=len(own),
                medians={metric: median(known) if known else None for metric, known in values.items()},
                ranges={metric: (min(known), max(known)) if known else None for metric, known in values.items()},
                requests=settings.requests,
                outputs_equal_to_large_pool=median(equal) if equal else None,
            )
        )
    return summaries


def ratios(samples: Sequence[Sample]) -> dict[str, dict[str, float | None]]:
    """Medians over rounds of the ratio of two arms in one round, by `upper/lower` and metric."""
    found: dict[str, dict[str, float | None]] = {}
    by_arm: dict[str, dict[int, Sample]] = {}
    for sample in samples:
        by_arm.setdefault(sample.arm, {})[sample.round] = sample
    for upper, lower in COMPARISONS:
        if upper in by_arm and lower in by_arm:
            rounds = by_arm[upper].keys() & by_arm[lower].keys()
            pairs = [(by_arm[upper][number], by_arm[lower][number]) for number in sorted(rounds)]
            found[f"{upper}/{lower}"] = {metric: _median_ratio(pairs, metric) for metric in RATIOS}
    return found


def _median_ratio(pairs: Sequence[tuple[Sample, Sample]], metric: str) -> float | None:
    values = [(upper.value(metric), lower.value(metric)) for upper, lower in pairs]
    known = [above / below for above, below in values if above is not None and below]
    return median(known) if len(known) == len(pairs) and known else None


def _known(values: Sequence[float | None]) -> list[float]:
    """`values`, or nothing at all if one of them was not measured: a median over a part would mislead."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []
