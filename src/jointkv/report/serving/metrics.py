"""The numbers of a run that reports show, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from jointkv.bench.result import Run
from jointkv.report.markdown import NOT_MEASURED

Value = Callable[[Run], float | None]


@dataclass(frozen=True)
class Metric:
    """One number of a run.

    Attributes:
        name: as in the comparisons of a result.
        title: for tables, with its unit.
        value: of a run, in the unit of the title; None where not measured.
        form: how a value is written.
        higher_is_better: None where neither is.
    """

    name: str
    title: str
    value: Value
    form: str
    higher_is_better: bool | None = None

    @property
    def short(self) -> str:
        """The title without its unit."""
        return self.title.split(",")[0]

    def samples(self, runs: Sequence[Run]) -> list[float]:
        """The values of `runs`, without those that were not measured."""
        return [value for value in map(self.value, runs) if value is not None]

    def written(self, value: float) -> str:
        """`value` as tables show it."""
        return format(value, self.form)

    def median(self, runs: Sequence[Run]) -> str:
        """The median over `runs`, or the mark of what was not measured."""
        samples = self.samples(runs)
        return self.written(median(samples)) if samples else NOT_MEASURED

    def range(self, runs: Sequence[Run]) -> str:
        """The smallest and the largest value; empty where there are not two or all are written alike."""
        samples = self.samples(runs)
        ends = [self.written(end) for end in (min(samples), max(samples))] if len(samples) > 1 else []
        return f"{ends[0]} to {ends[1]}" if len(set(ends)) > 1 else ""


def _itl(part: str) -> Value:
    return lambda run: None if run.itl is None else 1e3 * float(getattr(run.itl, part))


def _tpot(run: Run) -> float | None:
    return None if run.tpot is None else 1e3 * run.tpot.p50


OUTPUT_RATE = Metric("output_tokens_per_s", "output tokens/s", lambda run: run.output_tokens_per_s, ",.1f", True)
TTFT_P95 = Metric("ttft_p95", "TTFT p95, s", lambda run: run.ttft.p95, ",.2f", False)
E2EL_P95 = Metric("e2el_p95", "end-to-end p95, s", lambda run: run.e2el.p95, ",.2f", False)
ITL_P50 = Metric("itl_p50", "ITL p50, ms", _itl("p50"), ",.0f", False)
TTFT_P50 = Metric("ttft_p50", "TTFT p50, s", lambda run: run.ttft.p50, ",.2f", False)
RUNNING_PEAK = Metric("running_peak", "peak running", lambda run: run.running_peak, ",.0f")
PREEMPTIONS = Metric("preemptions", "preemptions", lambda run: run.preemptions, ",.0f", False)
PAGES_FREED = Metric("pages_freed", "pages freed by merging", lambda run: run.pages_freed, ",.0f")
POOL_PEAK = Metric("pool_usage_peak", "peak pool in use", lambda run: run.pool_usage_peak, ".0%")
KV_PER_TOKEN = Metric(
    "kv_bytes_per_running_token",
    "KV KiB per running token",
    lambda run: None if run.kv_bytes_per_running_token is None else run.kv_bytes_per_running_token / 1024,
    ",.2f",
    False,
)
WAITING_MEAN = Metric("waiting_mean", "mean waiting", lambda run: run.waiting_mean, ",.1f", False)
PLUGIN_SECONDS = Metric("plugin_seconds", "plugin, s", lambda run: run.plugin_seconds, ",.2f")
FAILED = Metric("failed", "failed requests", lambda run: run.failed, ",.0f", False)

GROUPS: dict[str, tuple[Metric, ...]] = {
    "Throughput": (
        OUTPUT_RATE,
        Metric("total_tokens_per_s", "all tokens/s", lambda run: run.total_tokens_per_s, ",.1f", True),
        Metric("requests_per_s", "requests/s", lambda run: run.requests_per_s, ",.3f", True),
    ),
    "Latency": (
        TTFT_P50,
        TTFT_P95,
        ITL_P50,
        Metric("itl_p95", "ITL p95, ms", _itl("p95"), ",.0f", False),
        Metric("tpot_p50", "TPOT p50, ms", _tpot, ",.0f", False),
        Metric("e2el_p50", "end-to-end p50, s", lambda run: run.e2el.p50, ",.2f", False),
        E2EL_P95,
    ),
    "Requests at once": (
        RUNNING_PEAK,
        Metric("running_mean", "mean running", lambda run: run.running_mean, ",.1f"),
        Metric("waiting_peak", "peak waiting", lambda run: run.waiting_peak, ",.0f", False),
        WAITING_MEAN,
    ),
    "KV memory": (
        POOL_PEAK,
        Metric("pool_usage_mean", "mean pool in use", lambda run: run.pool_usage_mean, ".0%"),
        PREEMPTIONS,
        Metric("recomputed_tokens", "recomputed tokens", lambda run: run.recomputed_tokens, ",.0f", False),
        PAGES_FREED,
        KV_PER_TOKEN,
    ),
    "Cost": (
        PLUGIN_SECONDS,
        Metric("server_cpu_seconds", "CPU of the server, s", lambda run: run.server_cpu_seconds, ",.0f", False),
        Metric("seconds", "length of the run, s", lambda run: run.seconds, ",.0f"),
        Metric("foreign_cpu", "CPU of other processes", lambda run: run.foreign_cpu, ".1%"),
        FAILED,
    ),
}
"""What the tables of the page show, in this order."""

DECISIVE = (OUTPUT_RATE, TTFT_P95, E2EL_P95)
"""What a verdict rests on."""

COMPARED = (*DECISIVE, ITL_P50)
"""What the table of ratios has."""

DRAWN = (*COMPARED, RUNNING_PEAK, KV_PER_TOKEN)
"""What is drawn against the load and as ratios."""
