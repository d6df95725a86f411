"""The paper's policy in a serving engine against the tree offline: what pages are left, and are the plans equal?

Run it in the environment with vLLM: `.venv-vllm/bin/python benchmarks/paper_plan.py --output docs/results/bench`.
Blocks of unrelated requests become full in one step; the engine decides on them as they come, the trees on the same K
and V.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines import BLOCK_SIZE, build, in_a_process_of_its_own, prepare_environment, scheduler_of, tell
from jointkv.core.blocks import PagedKV
from jointkv.core.packed import PackedPages
from jointkv.fusion.pairs import pair_statistics
from jointkv.policy import FusionPolicy
from timing import write

LAYER_GROUPS, SETTLED = 15, 8
RUNS = ((0.75, 8), (0.75, 2), (0.8, 8), (0.9, 8), (0.75, 0), (0.8, 0), (0.9, 0))
"""Thresholds, and candidates compared with a block; with none all are compared with all, and directions are written."""
WRITTEN = {"directions": "written", "own_norms": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8, help="that become full together")
    parser.add_argument("--blocks", type=int, default=4, help="of each")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    prepare_environment(2 << 30)
    if arguments.one:
        tell(run(float(arguments.one[0]), int(arguments.one[1]), arguments.requests, arguments.blocks))
    size = ("--requests", str(arguments.requests), "--blocks", str(arguments.blocks))
    rows = [in_a_process_of_its_own(__file__, *size, "--one", str(threshold), str(most)) for threshold, most in RUNS]
    headline = {f"{row['threshold']}, {row['max_candidates'] or 'written'}": row["pages"] for row in rows}
    write(arguments.output, "paper_plan", {"layer_groups": LAYER_GROUPS, "rows": rows, "headline": headline})


def run(threshold: float, most: int, requests: int, blocks: int) -> dict[str, Any]:
    """One engine: the tables before and after it has decided, and what the trees make of the pages before."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from jointkv.evaluate.traffic.unrelated import Unrelated
    from jointkv.hf.models import fetch_model
    from jointkv.vllm_plugin import engine_args

    options = {"policy": "paper", "accept_unbounded": True, "layer_groups": LAYER_GROUPS, "min_pool_usage": 0.0}
    serves: dict[str, Any] = {"max_candidates": most} if most else WRITTEN
    attached = engine_args(**options, key_threshold=threshold, **serves)
    pages = 1 + LAYER_GROUPS * requests * (blocks + 2)
    engine = build("float32", requests, pages, max_model_len=(blocks + 2) * BLOCK_SIZE, **attached)
    sampling = SamplingParams(temperature=0, max_tokens=SETTLED + 2, ignore_eos=True, detokenize=False)
    drawn = Unrelated().requests(AutoTokenizer.from_pretrained(fetch_model("smollm2")), requests)
    for number, request in enumerate(drawn):
        prompt = list(request.prompt)[: blocks * BLOCK_SIZE + BLOCK_SIZE // 4]
        engine.add_request(f"{number:04}", {"prompt_token_ids": prompt}, sampling)
    engine.step()
    held: dict[int, PackedPages] = get_kv_transfer_group().worker.comparer.groups
    kept = {group: copied(pages, tables(engine, group, blocks)) for group, pages in held.items()}
    for _ in range(SETTLED):
        engine.step()
    found: Counter[str] = Counter()
    for group, kv in kept.items():
        compare(found, kv, tables(engine, group, blocks), threshold)
    return {
        "threshold": threshold,
        "max_candidates": most,
        "compare_seconds": scheduler_of(engine).connector.scheduler.totals()["compare_seconds"],
        "blocks": found["blocks"],
        "positions": found["positions"],
        "pages": {name: found[name] for name in ("engine", "resident", "direction")},
        "positions_alike": {name: found[f"alike {name}"] for name in ("resident", "direction")},
    }


def tables(engine: Any, group: int, blocks: int) -> Tensor:
    """Pages of the first blocks of all requests, in the order in which they came: `[blocks, requests]`."""
    held = scheduler_of(engine).kv_cache_manager.coordinator.single_type_managers[group].req_to_blocks
    return torch.tensor([[block.block_id for block in held[name][:blocks]] for name in sorted(held)]).T


def copied(pages: PackedPages, numbers: Tensor) -> PagedKV:
    """K and V of some pages as they are now, tokens in order."""
    keys, values = pages.vectors(numbers.flatten())
    return PagedKV(*([side.unflatten(1, (pages.block_size, 1, -1)) for side in sides] for sides in (keys, values)))


def compare(found: Counter[str], kv: PagedKV, table: Tensor, threshold: float) -> None:
    """Count pages and equal positions of one layer group."""
    numbers = torch.arange(table.numel()).view_as(table)
    resident = FusionPolicy(similarity="key", key_threshold=threshold, max_relative_error=None, max_token_error=None)
    planned = {}
    for name, policy in (("resident", resident), ("direction", FusionPolicy.preset("paper", key_threshold=threshold))):
        planned[name] = policy.rule().group(pair_statistics(kv, numbers, policy.rule()))
    for slot, row in enumerate(table.tolist()):
        found["positions"] += 1
        found["blocks"] += len(row)
        found["engine"] += len(set(row))
        for name, leaders in planned.items():
            groups = leaders[slot].tolist()
            found[name] += len(set(groups))
            found[f"alike {name}"] += firsts(groups) == firsts(row)


def firsts(groups: Sequence[int]) -> list[int]:
    """Each one's first of its group, whatever the groups are called."""
    return [groups.index(one) for one in groups]


if __name__ == "__main__":
    main()
