"""What one more running request costs a serving engine: seconds per decode step and where they go, stock vLLM.

Run it in the environment with vLLM: `.venv-vllm/bin/python benchmarks/engine_step.py --output docs/results/bench`.
Fusion lets more requests run at once. That is worth as much as a step of many requests is cheaper than many steps of
one, which this measures, beside two floors: bytes read over the measured copy bandwidth, operations over the measured
speed of a large matrix product.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engines import BLOCK_SIZE, build, prepare_environment, scheduler_of
from jointkv.system.machine import fast_dtype
from timing import machine_speed, timed, write

WARM_UP, PROFILED = 2, 3
KINDS = {"attention": "cpu_attention_with_kv_cache", "matrix products": "onednn_mm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 48], help="requests at once")
    parser.add_argument("--context", type=int, default=850, help="tokens each of them holds")
    parser.add_argument("--repeats", type=int, default=9, help="steps that are timed")
    parser.add_argument("--dtype", help="of the model and its KV cache; default: what is fast here")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    prepare_environment(6 * 2**30)
    dtype = arguments.dtype or fast_dtype()
    most = max(arguments.running)
    blocks = most * (-(-(arguments.context + 64) // BLOCK_SIZE)) + 8
    engine = build(dtype, most, blocks, enable_prefix_caching=False)
    speed = machine_speed(getattr(torch, dtype))
    rows = [measure(engine, running, arguments.context, arguments.repeats) for running in arguments.running]
    model = shape(engine)
    for row in rows:
        row.update(floors(row["running"], arguments.context, model, speed))
    first, last = rows[0], rows[-1]
    result = {
        "dtype": dtype,
        "context": arguments.context,
        "model": model,
        "measured_speed": speed,
        "rows": rows,
        "headline": {
            f"ms_per_token_{row['running']}": round(1e3 * row["seconds_per_token"], 2) for row in (first, last)
        },
    }
    write(arguments.output, "engine_step", result)
    os._exit(0)  # the engine's threads need not be waited for


def measure(engine: Any, running: int, context: int, repeats: int) -> dict[str, Any]:
    """`running` requests of `context` random tokens: the prefill, then `repeats` timed decode steps, then a profile."""
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    draw = random.Random(running)
    sampling = SamplingParams(temperature=0, max_tokens=context, ignore_eos=True, detokenize=False)
    names = [
        engine.add_request(
            f"{running}-{number}", {"prompt_token_ids": draw.choices(range(1000, 40000), k=context)}, sampling
        )
        for number in range(running)
    ]
    scheduler = scheduler_of(engine)
    start = time.perf_counter()
    while any(request.num_output_tokens == 0 for request in scheduler.requests.values()):
        engine.step()
    prefill = time.perf_counter() - start
    steps = timed(engine.step, repeats, WARM_UP)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(PROFILED):
            engine.step()
    engine.abort_request(names, internal=True)
    engine.step()
    return {
        "running": running,
        "prefill_tokens_per_s": running * context / prefill,
        "seconds_per_step": median(steps),
        "seconds_per_token": median(steps) / running,
        "steps": steps,
        "shares": shares(profiled.key_averages()),
    }


def shares(operations: Any) -> dict[str, float]:
    """Part of the time in each of KINDS; the rest is everything else."""
    total = sum(operation.self_cpu_time_total for operation in operations)
    found = {
        kind: sum(each.self_cpu_time_total for each in operations if name in each.key) / total
        for kind, name in KINDS.items()
    }
    return {**found, "the rest": 1 - sum(found.values())}


def shape(engine: Any) -> dict[str, int]:
    """Bytes of the weights, bytes of K and V per token, weights that multiply, and numbers of a query per layer."""
    from transformers import AutoModelForCausalLM

    config = engine.vllm_config.model_config.hf_text_config
    # vLLM repacks the weights for the processor and drops the parameters, so they are counted on the plain model.
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    head_size = config.hidden_size // config.num_attention_heads
    itemsize = engine.vllm_config.model_config.dtype.itemsize
    return {
        "weight_bytes": weights * itemsize,
        "kv_bytes_per_token": 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * itemsize,
        "weights": weights,
        "query_numbers": config.num_hidden_layers * config.num_attention_heads * head_size,
    }


def floors(running: int, context: int, model: dict[str, int], speed: dict[str, float]) -> dict[str, float]:
    """Least seconds of a step by bytes (weights once, every request's K and V) and by operations."""
    moved = model["weight_bytes"] + running * context * model["kv_bytes_per_token"]
    operations = running * (2 * model["weights"] + 4 * context * model["query_numbers"])
    return {
        "bytes_moved": moved,
        "operations": operations,
        "floor_bytes_seconds": moved / speed["copy_bytes_per_s"],
        "floor_operations_seconds": operations / speed["operations_per_s"],
    }


if __name__ == "__main__":
    main()
