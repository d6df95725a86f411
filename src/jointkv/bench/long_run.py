"""What a long run on one server leaves behind: latency over time, licences, memory, and pages that nobody gave back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from jointkv.bench.record import Record
from jointkv.bench.result import RequestSample
from jointkv.bench.reuse import COUNTERS, HELD, total
from jointkv.bench.watch import POOL_USAGE, PREEMPTIONS, RUNNING, WAITING


class Moment(Record):
    """The server at one time of a load.

    Attributes:
        seconds: since the load began.
        pool_usage: part of the pool in use, 0 to 1.
        preemptions, licences_granted, licences_lost, tokens_skipped: since the server's start.
        licences: held.
        rss_mib: of all its processes.
    """

    seconds: float
    running: float
    waiting: float
    pool_usage: float
    preemptions: float
    licences: float
    licences_granted: float
    licences_lost: float
    tokens_skipped: float
    rss_mib: float

    @classmethod
    def of(cls, metrics: Mapping[str, float], seconds: float, rss_mib: float) -> Moment:
        """From a page of `jointkv.bench.watch.read`."""
        return cls(
            seconds=seconds,
            running=metrics.get(RUNNING, 0.0),
            waiting=metrics.get(WAITING, 0.0),
            pool_usage=metrics.get(POOL_USAGE, 0.0),
            preemptions=metrics.get(PREEMPTIONS, 0.0),
            licences=total(metrics, HELD),
            licences_granted=total(metrics, COUNTERS["licences_granted"]),
            licences_lost=total(metrics, COUNTERS["licences_lost"]),
            tokens_skipped=total(metrics, COUNTERS["skipped_tokens"]),
            rss_mib=rss_mib,
        )


class Phase(Record):
    """One load of a long run.

    Attributes:
        share: of what stock can do.
        rate: requests per second.
        failed: requests without a complete answer.
        pages_left: in use when all had ended.
    """

    share: float
    rate: float
    seconds: float
    failed: int
    samples: list[RequestSample] = Field(min_length=1)
    moments: list[Moment] = Field(min_length=1)
    pages_left: int

    def ttft(self, part: Literal["first", "last", "all"], percent: float) -> float:
        """That percentile of the seconds to the first token, of the first or last third of the requests by arrival."""
        times = [sample.ttft for sample in sorted(self.samples, key=lambda sample: sample.start)]
        third = max(1, len(times) // 3)
        chosen = {"first": times[:third], "last": times[-third:], "all": times}[part]
        return float(np.percentile(chosen, percent))

    def grown(self, name: str) -> float:
        """By how much a field of `Moment` is larger at the end than at the beginning."""
        return float(getattr(self.moments[-1], name) - getattr(self.moments[0], name))


class LongRun(Record):
    """All loads, one after another on one server of one arm.

    Attributes:
        capacity: requests per second that stock answers when as many are under way as may run.
        pages_held: whether a page was still in use at the end, so that vLLM would not empty its prefix cache.
    """

    format: Literal["jointkv.long_run/1"] = "jointkv.long_run/1"
    command: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    model: str
    traffic: str
    arm: str
    fusion: dict[str, Any] | None
    pool_blocks: int
    capacity: float
    phases: list[Phase] = Field(min_length=1)
    pages_held: bool
