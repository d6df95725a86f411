"""Decode steps of one engine with vLLM's attention and with the one that reads shared pages once, in turns.

Run it in the environment with vLLM:
`.venv-vllm/bin/python benchmarks/engine_attention.py --output docs/results/kernels`. Near-prefix requests are merged as
they come in; then every other step is computed by the other attention, so that a drift of the machine meets both alike.
The pool is ample: nothing is gained here by holding more requests.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from engines import BLOCK_SIZE, MAX_MODEL_LEN, MODEL, build, prepare_environment, scheduler_of
from jointkv.system.machine import fast_dtype
from timing import median_ratio, write

OUTPUT_TOKENS, WARM_UP = 256, 4


@dataclass
class Chosen:
    """In place of a `Switch`: whoever steps the engine says which attention the step is for."""

    shared: bool = True

    def pays(self, work: Any) -> bool:
        return self.shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[8, 16, 32], help="requests at once")
    parser.add_argument("--traffic", nargs="+", default=["near_prefix", "unrelated"])
    parser.add_argument("--repeats", type=int, default=15, help="pairs of decode steps")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    prepare_environment(6 * 2**30)
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from jointkv.vllm_plugin import engine_args

    dtype, most = fast_dtype(), max(arguments.running)
    attached = engine_args(min_pool_usage=0.0, attention="shared")
    engine = build(dtype, most, most * MAX_MODEL_LEN // BLOCK_SIZE // 2, **attached)
    (reading,) = get_kv_transfer_group().readings.values()
    reading.switch = chosen = Chosen()
    rows = [
        measure(engine, chosen, traffic, running, arguments.repeats)
        for traffic in arguments.traffic
        for running in arguments.running
    ]
    assert reading.fault is None, reading.fault
    headline = {f"{row['traffic']}_{row['running']}": round(row["stock_over_shared"], 2) for row in rows}
    write(arguments.output, "engine_attention", {"dtype": dtype, "headline": headline, "rows": rows})
    os._exit(0)  # the engine's threads need not be waited for


def measure(engine: Any, chosen: Chosen, traffic: str, running: int, repeats: int) -> dict[str, Any]:
    """`running` requests: the prefill, then `repeats` pairs of decode steps."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    from jointkv.evaluate.traffic import get_traffic
    from jointkv.hf.models import fetch_model

    tokenizer = AutoTokenizer.from_pretrained(str(fetch_model(MODEL)))
    requests = get_traffic(traffic).requests(tokenizer, running, seed=running)
    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False)
    names = [
        engine.add_request(f"{traffic}-{running}-{number}", {"prompt_token_ids": list(request.prompt)}, sampling)
        for number, request in enumerate(requests)
    ]
    scheduler = scheduler_of(engine)
    while any(request.num_output_tokens == 0 for request in scheduler.requests.values()):
        engine.step()
    for _ in range(WARM_UP):
        engine.step()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(repeats):
        for shared in (True, False) if pair % 2 else (False, True):
            chosen.shared = shared
            start = time.perf_counter()
            engine.step()
            seconds[shared].append(time.perf_counter() - start)
    chosen.shared = True
    tables = scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks
    pages = [block.block_id for name in tables for block in tables[name]]
    engine.abort_request(names, internal=True)
    engine.step()
    row = {
        "traffic": traffic,
        "running": running,
        "blocks": len(pages),
        "pages": len(set(pages)),
        "stock_seconds": seconds[False],
        "shared_seconds": seconds[True],
        "stock_over_shared": median_ratio(seconds[False], seconds[True]),
    }
    print(
        f"{traffic}, {running} running, {row['blocks']} blocks in {row['pages']} pages: "
        f"{1e3 * median(seconds[False]):.1f} and {1e3 * median(seconds[True]):.1f} ms a step",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
