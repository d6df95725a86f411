"""The numbers of a run that reports show: their names and units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from jointkv.bench.result import Run
from jointkv.report.markdown import NOT_MEASURED


@dataclass(frozen=True)
class Metric:
    """One number of a run.

    Attributes:
        field: of the run; `ttft.p95` is a field of its `ttft`.
        title: for tables, with its unit.
        form: how a value is written.
        higher_is_better: None where neither is.
        scale: from the unit of the field to that of the title.
    """

    field: str
    title: str
    form: str
    higher_is_better: bool | None = None
    scale: float = 1

    @property
    def short(self) -> str:
        """The title without its unit."""
        return self.title.split(",")[0]

    def value(self, run: Run) -> float | None:
        """Of a run, in the unit of the title; None where not measured."""
        found: object = run
        for part in self.field.split("."):
            found = None if found is None else getattr(found, part)
        return found * self.scale if isinstance(found, int | float) else None

    def samples(self, runs: Sequence[Run]) -> list[float]:
        """The values of `runs`, without those that were not measured."""
        return [value for value in map(self.value, runs) if value is not None]

    def median(self, runs: Sequence[Run]) -> str:
        """The median over `runs`, or the mark of what was not measured."""
        samples = self.samples(runs)
        return format(median(samples), self.form) if samples else NOT_MEASURED

    def with_range(self, runs: Sequence[Run]) -> str:
        """The median, with the smallest and the largest value in brackets where they are not written alike."""
        samples = self.samples(runs)
        ends = [format(end, self.form) for end in (min(samples), max(samples))] if len(samples) > 1 else []
        return self.median(runs) + (f" ({ends[0]} to {ends[1]})" if len(set(ends)) > 1 else "")


TTFT_P50 = Metric("ttft.p50", "TTFT p50, s", ",.2f", False)
TTFT_P95 = Metric("ttft.p95", "TTFT p95, s", ",.2f", False)
TTFT_P99 = Metric("ttft.p99", "TTFT p99, s", ",.2f", False)
OUTPUT_RATE = Metric("output_tokens_per_s", "output tokens/s", ",.1f", True)
ITL_P50 = Metric("itl.p50", "ITL p50, ms", ",.0f", False, 1e3)
ITL_MEAN = Metric("itl.mean", "mean ITL, ms", ",.0f", False, 1e3)
ITL_P95 = Metric("itl.p95", "ITL p95, ms", ",.0f", False, 1e3)
E2EL_P50 = Metric("e2el.p50", "end-to-end p50, s", ",.2f", False)
E2EL_P95 = Metric("e2el.p95", "end-to-end p95, s", ",.2f", False)
RUNNING_PEAK = Metric("running_peak", "peak running", ",.0f")
WAITING_MEAN = Metric("waiting_mean", "mean waiting", ",.1f", False)
PREEMPTIONS = Metric("preemptions", "preemptions", ",.0f", False)
PAGES_FREED = Metric("pages_freed", "pages freed by merging", ",.0f")
COMPUTED = Metric("prompt_tokens_computed", "prompt tokens computed", ",.0f", False)
SKIPPED = Metric("skipped_share", "prompt tokens skipped", ".0%")
AUDITED = Metric("reuse.audited_blocks", "blocks audited", ",.0f")
MISSED = Metric("reuse.missed_blocks", "audited blocks beyond the bounds", ",.0f")
KV_PER_TOKEN = Metric("kv_bytes_per_running_token", "KV KiB per running token", ",.2f", False, 1 / 1024)
PLUGIN_SECONDS = Metric("plugin_seconds", "plugin, s", ",.2f")
SECONDS = Metric("seconds", "length of the run, s", ",.0f")
FOREIGN_CPU = Metric("foreign_cpu", "CPU of other processes", ".1%")
FAILED = Metric("failed", "failed requests", ",.0f", False)

STORED = (
    Metric("stored.tokens_loaded", "prompt tokens loaded", ",.0f"),
    Metric("stored.pages_read", "pages loaded", ",.0f"),
    Metric("stored.bytes_read", "read from the store, MB", ",.1f", scale=1e-6),
    Metric("stored.bytes_written", "written to the store, MB", ",.1f", scale=1e-6),
)
"""What tables have of results with a store."""

GROUPS: dict[str, tuple[Metric, ...]] = {
    "Latency": (
        TTFT_P50,
        TTFT_P95,
        TTFT_P99,
        ITL_P50,
        ITL_P95,
        Metric("tpot.p50", "TPOT p50, ms", ",.0f", False, 1e3),
        E2EL_P50,
        E2EL_P95,
    ),
    "Throughput": (
        OUTPUT_RATE,
        Metric("total_tokens_per_s", "all tokens/s", ",.1f", True),
        Metric("requests_per_s", "requests/s", ",.3f", True),
    ),
    "Prefill": (
        COMPUTED,
        Metric("recomputed_tokens", "recomputed tokens", ",.0f", False),
        Metric("reuse.skipped_tokens", "tokens skipped", ",.0f"),
        SKIPPED,
        Metric("reuse.runs", "runs read from resident pages", ",.0f"),
        Metric("reuse.gaps", "gaps computed", ",.0f"),
        Metric("reuse.audits", "runs audited", ",.0f"),
        AUDITED,
        MISSED,
        Metric("reuse.licences", "licences at the end", ",.0f"),
        Metric("reuse.licences_lost", "licences lost", ",.0f"),
        Metric("reuse.audits_until_licence", "runs audited until the first licence", ",.0f"),
    ),
    "Stored pages": (*STORED, Metric("stored.pages_lost", "pages lost", ",.0f", False)),
    "Requests at once": (
        RUNNING_PEAK,
        Metric("running_mean", "mean running", ",.1f"),
        Metric("waiting_peak", "peak waiting", ",.0f", False),
        WAITING_MEAN,
    ),
    "KV memory": (
        Metric("pool_usage_peak", "peak pool in use", ".0%"),
        Metric("pool_usage_mean", "mean pool in use", ".0%"),
        PREEMPTIONS,
        PAGES_FREED,
        KV_PER_TOKEN,
    ),
    "Before the run": (
        Metric("warmup.seconds", "warm-up, s", ",.0f"),
        Metric("warmup.requests", "requests in it", ",.0f"),
        Metric("warmup.reuse.audits", "runs audited in it", ",.0f"),
        Metric("warmup.reuse.missed_blocks", "audited blocks beyond the bounds in it", ",.0f"),
        Metric("warmup.reuse.audits_until_licence", "runs audited until the first licence in it", ",.0f"),
    ),
    "Cost": (
        PLUGIN_SECONDS,
        Metric("reuse.plan_seconds", "of these planning reuse, s", ",.3f"),
        Metric("server_cpu_seconds", "CPU of the server, s", ",.0f", False),
        SECONDS,
        FOREIGN_CPU,
        FAILED,
    ),
}
"""What the tables of the page show, in this order."""

DECISIVE = (TTFT_P95, OUTPUT_RATE, E2EL_P95)
"""What a verdict rests on."""

SAID = (*DECISIVE, ITL_P50)
"""What its sentence has."""

COMPARED = (TTFT_P50, *SAID)
"""What the table of ratios has."""

SHOWN = (TTFT_P50, TTFT_P95, TTFT_P99)
"""What Markdown tables have before the output rate."""

SHOWN_BEHIND = (
    *(ITL_P50, E2EL_P95, COMPUTED, SKIPPED, RUNNING_PEAK, WAITING_MEAN, PREEMPTIONS, PAGES_FREED, PLUGIN_SECONDS),
)
"""What they have behind it."""

DRAWN = (*SAID, COMPUTED, RUNNING_PEAK, KV_PER_TOKEN)
"""What is drawn against the load and as ratios."""
