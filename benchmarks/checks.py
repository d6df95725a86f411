"""What the checks cost that stay on in production: their share of the time of an engine's steps.

Run it in the environment with vLLM: `.venv-vllm/bin/python benchmarks/checks.py --output docs/results/bench`.
Each check is timed where it stands while near-duplicate requests are served with a bound so wide that every candidate
is merged: more checks than any real traffic asks for. The timer's own cost counts as the checks'.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from engines import BLOCK_SIZE, build, prepare_environment, scheduler_of
from jointkv.system.machine import fast_dtype
from timing import write

SHARED, OWN, OUT = 640, 32, 64
FUSION = {"min_pool_usage": 0.0, "max_relative_error": 0.9, "max_token_error": 2.0}
CHECKS = {
    "may_replace": "before every merge: the request, its table entry and its page are as they were when proposed",
    "bounds": "before every merge: the errors are within the bounds that are in force",
    "verdict": "every verdict: its form, and errors that are numbers",
    "order of verdicts": "every step and every verdict: none before it is missing",
    "order of inquiries": "every step without remaps: none before it is missing",
    "recovery": "every request: whether fusion is off, and to be tried again",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=16, help="requests at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", help="of the model and its KV cache; default: what is fast here")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    prepare_environment(4 * 2**30)
    from jointkv.vllm_plugin import engine_args

    dtype = arguments.dtype or fast_dtype()
    blocks = arguments.running * (-(-(SHARED + OWN + OUT) // BLOCK_SIZE) + 1) + 8
    # Statistics are on, as in production: the plugin's metrics come with them.
    engine = build(dtype, arguments.running, blocks, disable_log_stats=False, **engine_args(**FUSION))
    clock = Clock()
    attach(engine, clock)
    serve(engine, arguments.running, seed=0)  # warms up
    rounds = [measure(engine, clock, arguments.running, seed) for seed in range(1, arguments.repeats + 1)]
    shares = [found["share"] for found in rounds]
    result = {
        "dtype": dtype,
        "running": arguments.running,
        "prompt_tokens": SHARED + OWN,
        "output_tokens": OUT,
        "fusion": FUSION,
        "checks": CHECKS,
        "rounds": rounds,
        "headline": {
            "share_of_step_time": round(median(shares), 6),
            "worst_round": round(max(shares), 6),
            "microseconds_per_step": round(median(1e6 * found["seconds"] / found["steps"] for found in rounds), 2),
        },
    }
    write(arguments.output, "checks", result)
    os._exit(0)  # the engine's threads need not be waited for


class Clock:
    """Calls and seconds of every check since the last `take`."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = defaultdict(int)
        self._seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, check: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return check(*args)
            finally:
                self._seconds[name] += time.perf_counter() - start
                self._calls[name] += 1

        return measured

    def take(self) -> dict[str, dict[str, float]]:
        found = {
            name: {
                "calls": self._calls[name],
                "seconds": self._seconds[name],
                "microseconds_per_call": 1e6 * self._seconds[name] / max(1, self._calls[name]),
            }
            for name in CHECKS
        }
        self._calls.clear()
        self._seconds.clear()
        return found


def attach(engine: Any, clock: Clock) -> None:
    """Time every check where it stands."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from jointkv.vllm_plugin.messages import Verdict

    side, worker = scheduler_of(engine).connector.scheduler, get_kv_transfer_group().worker
    apply = worker.apply
    places = (
        ("may_replace", side.tables, "may_replace"),
        ("bounds", side.bounds, "allowed"),
        ("verdict", Verdict, "check"),
        ("order of verdicts", side.fusion, "_expect_none_before"),
        ("recovery", side.recovery, "resume"),
    )
    for name, owner, method in places:
        setattr(owner, method, clock.timed(name, getattr(owner, method)))
    bare = clock.timed("order of inquiries", apply)
    worker.apply = lambda inquiry: apply(inquiry) if inquiry.remaps else bare(inquiry)


def serve(engine: Any, running: int, seed: int) -> int:
    """Requests that share all but their first and last tokens; the number of steps."""
    from vllm import SamplingParams

    draw = random.Random(seed)
    shared = draw.choices(range(1000, 40000), k=SHARED)
    sampling = SamplingParams(temperature=0, max_tokens=OUT, ignore_eos=True, detokenize=False)
    for number in range(running):
        own = draw.choices(range(1000, 40000), k=OWN)
        engine.add_request(f"{seed}-{number}", {"prompt_token_ids": [*own[:16], *shared, *own[16:]]}, sampling)
    steps = 0
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
    return steps


def measure(engine: Any, clock: Clock, running: int, seed: int) -> dict[str, Any]:
    side = scheduler_of(engine).connector.scheduler
    clock.take()
    before, start = side.totals(), time.perf_counter()
    steps = serve(engine, running, seed)
    wall, after = time.perf_counter() - start, side.totals()
    checks = clock.take()
    seconds = sum(check["seconds"] for check in checks.values())
    if after["faults"]:
        raise SystemExit(f"fusion has switched itself off: {side.recovery.cause}")
    return {
        "steps": steps,
        "seconds_of_steps": wall,
        "merges": after["blocks_merged"] - before["blocks_merged"],
        "checks": checks,
        "seconds": seconds,
        "share": seconds / wall,
    }


if __name__ == "__main__":
    main()
