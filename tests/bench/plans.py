"""Runs, arms and a plan as the tests of the serving benchmark need them; nothing here was measured."""

from typing import Any

from jointkv.bench.plan import Plan
from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Arm, Latency, Load, Run, Timeline

CLOSED = Load(kind="closed", concurrency=2)
POISSON = Load(kind="poisson", rate=0.5)


def arm(name: str = "stock", pool_blocks: int = 100, **fields: Any) -> Arm:
    return Arm(name=name, title=name, pool_blocks=pool_blocks, **fields)


def latency(seconds: float) -> Latency:
    return Latency(mean=seconds, p50=seconds, p95=2 * seconds, p99=3 * seconds)


def run(name: str = "stock", load: Load = CLOSED, number: int = 1, **fields: Any) -> Run:
    made: dict[str, Any] = {
        **{"arm": name, "load": load.label, "round": number, "position": 0, "seconds": 2.0},
        **{"completed": 2, "failed": 0, "prompt_tokens": 20, "output_tokens": 8},
        **{"output_tokens_per_s": 4.0, "total_tokens_per_s": 14.0, "requests_per_s": 1.0},
        **{"ttft": latency(0.5), "tpot": latency(0.1), "itl": latency(0.1), "e2el": latency(1.0)},
        **{"running_peak": 2.0, "running_mean": 1.5, "waiting_peak": 1.0, "waiting_mean": 0.5, "preemptions": 0},
        **{"recomputed_tokens": 0, "pool_usage_peak": 0.9, "pool_usage_mean": 0.5, "pages_freed": None},
        **{"kv_bytes_per_running_token": None, "plugin_seconds": None, "server_cpu_seconds": None},
        **{"foreign_cpu": None, "fusion": None, "requests": []},
        "timeline": Timeline(seconds=[], running=[], waiting=[], pool_usage=[], preemptions=[]),
    }
    return Run(**{**made, **fields})


def plan(*, rounds: int = 2, loads: tuple[Load, ...] = (CLOSED, POISSON), names: tuple[str, ...] = ()) -> Plan:
    arms = tuple(arm(name) for name in names or ("stock", "fused"))
    facts = {
        **{"command": "jointkv bench serve", "model": "m", "traffic": "t", "traffic_description": "d", "requests": 2},
        **{"output_tokens": 4, "block_size": 16, "block_bytes": 64, "dtype": "float32", "seed": 5},
        **{"common_flags": ["--seed", "5"], "cores": {}, "machine": {}, "versions": {}},
    }
    return Plan(
        arms=arms,
        loads=loads,
        rounds=rounds,
        requests=(ServingRequest((1, 2), 4), ServingRequest((3,), 4)),
        block_bytes={each.name: 64 for each in arms},
        model="m",
        location="folder",
        seed=5,
        facts=facts,
    )
