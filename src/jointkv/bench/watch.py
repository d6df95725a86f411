"""Reads a server's /metrics while a load runs: a timeline, and what every counter grew by."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from contextlib import suppress
from typing import NamedTuple, Self

from jointkv.bench.result import Timeline
from jointkv.bench.reuse import SKIPPED, Reuse, reuse_of, total
from jointkv.bench.server import ServerFailed, get

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
POOL_USAGE = "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"
COMPUTED_PROMPT = "vllm:prompt_tokens_by_source_total.local_compute"
GENERATED = "vllm:generation_tokens_total"
FIRST_TOKENS = "vllm:time_to_first_token_seconds_count"
DRAFTS = "vllm:spec_decode_num_drafts_total"
PAGES_FREED = "jointkv_pages_freed_total"
DISABLED = "jointkv_state.disabled"
PLUGIN = "jointkv_"
SETTLE_SECONDS = 5.0
SETTLE_POLL_SECONDS = 0.1


def parse(text: str) -> dict[str, float]:
    """The samples of a page of Prometheus metrics: `name` or `name.label.label`, engines added up, no buckets."""
    # vLLM brings it; an environment without vLLM has no server to read.
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                labels = [value for name, value in sample.labels.items() if name not in ("engine", "model_name")]
                found[".".join([sample.name, *labels])] += sample.value
    return dict(found)


def read(url: str) -> dict[str, float]:
    """All metrics of the server at `url` now, as `parse` names them. Raises `OSError` where it does not answer."""
    return parse(get(f"{url}/metrics").decode())


class Reading(NamedTuple):
    """All metrics at one time of `time.perf_counter`."""

    time: float
    metrics: dict[str, float]


class Watch:
    """Reads the metrics of the server at `url` from entering to leaving the context, in a thread of its own.

    A reading that fails is left out, but the first one has to succeed. On leaving it waits until the server has counted
    its last requests.

    Attributes:
        interval: seconds between two readings.
        readings: in order; the first is from before the load and the last from after it.
    """

    def __init__(self, url: str, interval: float = 1.0) -> None:
        self.url, self.interval = url, interval
        self.readings: list[Reading] = []
        self._answers = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        if not self._read():
            raise ServerFailed(f"{self.url}/metrics could not be read")
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        deadline = time.monotonic() + (SETTLE_SECONDS if exception[0] is None else 0.0)
        # The last token reaches the client before the step it came from is counted.
        while self._read() and self._busy() and time.monotonic() < deadline:
            time.sleep(SETTLE_POLL_SECONDS)

    def grown(self) -> dict[str, float]:
        """By how much every metric was higher at the end than at the beginning; means something for counters.

        Raises:
            ServerFailed: the last reading failed, so there is no end.
        """
        if not self._answers:
            raise ServerFailed(f"{self.url}/metrics could not be read after the load")
        before, after = self.readings[0].metrics, self.readings[-1].metrics
        return {name: value - before.get(name, 0.0) for name, value in after.items()}

    def plugin_counters(self) -> dict[str, float] | None:
        """What the plugin counted, without the affixes of its metrics; None where it is not attached."""
        names = [name for name in self.readings[-1].metrics if name.startswith(PLUGIN)]
        if not names:
            return None
        grown = self.grown()
        # A histogram's sum and count grow too; gauges are the metrics with neither ending.
        return {
            name.removeprefix(PLUGIN).replace("_total", ""): grown[name]
            for name in names
            if name.partition(".")[0].endswith(("_total", "_sum", "_count"))
        }

    def reuse(self) -> Reuse | None:
        """What compute reuse did meanwhile; None where nothing counts that."""
        return reuse_of([reading.metrics for reading in self.readings])

    def timeline(self, began: float) -> Timeline:
        """What was read, with seconds since `began` on the clock of `time.perf_counter`, and counters from 0."""
        freed = self._counter(PAGES_FREED)
        skipped = [total(reading.metrics, SKIPPED) for reading in self.readings]
        return Timeline(
            seconds=[max(0.0, reading.time - began) for reading in self.readings],
            running=self._gauge(RUNNING),
            waiting=self._gauge(WAITING),
            pool_usage=self._gauge(POOL_USAGE),
            preemptions=self._counter(PREEMPTIONS),
            pages_freed=freed if PAGES_FREED in self.readings[-1].metrics else None,
            prompt_tokens_skipped=None if self.reuse() is None else [value - skipped[0] for value in skipped],
        )

    def _gauge(self, name: str) -> list[float]:
        return [reading.metrics.get(name, 0.0) for reading in self.readings]

    def _counter(self, name: str) -> list[float]:
        values = self._gauge(name)
        return [value - values[0] for value in values]

    def _busy(self) -> bool:
        return self._gauge(RUNNING)[-1] + self._gauge(WAITING)[-1] > 0

    def _poll(self) -> None:
        while not self._done.wait(self.interval):
            self._read()

    def _read(self) -> bool:
        self._answers = False
        with suppress(OSError):
            metrics = read(self.url)
            self.readings.append(Reading(time.perf_counter(), metrics))
            self._answers = True
        return self._answers
