"""Whether memory was what held a run back: where it was not, saving it cannot help."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal

from jointkv.bench.result import Arm, Load, ServingResult

State = Literal["short", "full", "blocked", "ample"]

FULL = 0.9
"""A pool of which at least this part is in use is full, and so is one without room for the longest request."""
WAITS = 1.0
"""Requests waiting on average from which on they queue; fewer are a moment's admission."""
STATES: dict[State, str] = {
    "short": "memory was short",
    "full": "memory was just enough",
    "blocked": "something other than memory held requests back",
    "ample": "memory was not short",
}


@dataclass(frozen=True)
class Pressure:
    """Memory of one arm under one load; medians over rounds.

    Attributes:
        state: `short`: full, and requests queued or were preempted. `full`: full without a queue. `blocked`: requests
            queued although there was room. `ample`: neither.
        usage: peak part of the pool in use.
        waiting: requests, mean over time.
    """

    state: State
    usage: float
    waiting: float


def pressure(result: ServingResult, arm: Arm, load: Load) -> Pressure:
    """Of an arm that was run under `load`."""
    runs = result.of(arm.name, load.label)
    usage = median(run.pool_usage_peak for run in runs)
    waiting = median(run.waiting_mean for run in runs)
    queued = waiting >= WAITS or median(run.preemptions for run in runs) > 0
    longest = max((each.prompt_tokens + each.output_tokens for run in runs for each in run.requests), default=0)
    full = usage >= FULL or (1 - usage) * arm.pool_blocks < longest / result.block_size
    state: State = ("short" if queued else "full") if full else ("blocked" if queued else "ample")
    return Pressure(state, usage, waiting)
