"""Planning one layer, 64 requests x 64 blocks of r = 3072, against the matrix products that it cannot avoid.

Unavoidable: every pair of blocks at a position meets once in the tree, as left half times right half on each level.
The floor is the time of exactly these products, in float32, on blocks that are already gathered.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch

from jointkv.core.blocks import PagedKV
from jointkv.core.plan import FusionPlan
from jointkv.fusion.pairs import pair_statistics
from jointkv.fusion.tree import plan_matrix
from jointkv.policy import FusionPolicy
from timing import median_ratio, paired, timed, write

BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE = 64, 16, 3, 64
POLICIES = {
    "keys": FusionPolicy.preset("paper", layer_groups=1, skip_first_layers=0, skip_last_layers=0),
    "keys and values": FusionPolicy.preset("safe"),
}


def make_pages(requests: int, dtype: torch.dtype, shared: float) -> PagedKV:
    """Random blocks; in groups of four requests, the share `shared` of the positions is nearly equal."""
    torch.manual_seed(0)
    layers = []
    for _ in range(2):
        pages = torch.randn(requests, BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE)
        alike = int(BLOCKS * shared)
        leader = torch.arange(requests) // 4 * 4
        pages[:, :alike] = pages[leader, :alike] + 0.03 * torch.randn_like(pages[:, :alike])
        layers.append([pages.flatten(0, 1).to(dtype)])
    return PagedKV(*layers)


def plan_batch(kv: PagedKV, requests: int, policy: FusionPolicy) -> FusionPlan:
    """Blocks of all requests at equal positions."""
    pages = torch.arange(requests * BLOCKS).view(requests, BLOCKS).T
    return plan_matrix(kv, pages, pages // BLOCKS, pages % BLOCKS, policy)


def level_products(blocks: torch.Tensor) -> None:
    """All left-times-right products of the tree over `blocks [positions, requests, r]`."""
    positions, requests, size = blocks.shape
    half = 1
    while half < requests:
        halves = blocks.view(positions, requests // (2 * half), 2, half, size)
        halves[:, :, 0] @ halves[:, :, 1].transpose(-1, -2)
        half *= 2


def measure(requests: int, dtype: torch.dtype, shared: float, name: str, repeats: int) -> dict[str, Any]:
    policy = POLICIES[name]
    kv = make_pages(requests, dtype, shared)
    pages = torch.arange(requests * BLOCKS).view(requests, BLOCKS).T
    sides = 1 if policy.similarity == "key" else 2
    gathered = kv.keys[0].flatten(1)[pages].float()

    def products() -> None:
        for _ in range(sides):
            level_products(gathered)

    def decide() -> None:
        rule = policy.rule()
        rule.group(pair_statistics(kv, pages, rule))

    floor, decided, planned = paired([products, decide, lambda: plan_batch(kv, requests, policy)], repeats, warmup=3)
    plan = plan_batch(kv, requests, policy)
    return {
        "policy": name,
        "requests": requests,
        "dtype": str(dtype).removeprefix("torch."),
        "share_alike": shared,
        "members": len(plan),
        "seconds_products": floor,
        "seconds_decide": decided,
        "seconds_plan": planned,
        "decide_over_products": median_ratio(decided, floor),
        "plan_over_products": median_ratio(planned, floor),
    }


def growth(repeats: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for requests in (8, 16, 32, 64, 128):
        kv = make_pages(requests, torch.bfloat16, 0.6)
        seconds = timed(lambda kv=kv, requests=requests: plan_batch(kv, requests, POLICIES["keys and values"]), repeats)
        rows.append({"requests": requests, "seconds_plan": seconds})
    first = rows[0]
    for row in rows:
        grown = row["requests"] / first["requests"]
        logs = torch.tensor([row["requests"], first["requests"]]).log2()
        row["times_first"] = median(row["seconds_plan"]) / median(first["seconds_plan"])
        row["n_log_n"] = grown * float(logs[0] / logs[1])
        row["n_squared"] = grown**2
    return rows


def run(output: Path, repeats: int = 5) -> None:
    rows = [
        measure(64, dtype, shared, name, repeats)
        for name in POLICIES
        for dtype in (torch.float32, torch.bfloat16)
        for shared in (0.0, 0.6)
    ]
    headline = {
        f"{row['policy']}, {row['dtype']}, {row['share_alike']:.0%} alike": {
            "decide": round(row["decide_over_products"], 2),
            "plan": round(row["plan_over_products"], 2),
        }
        for row in rows
    }
    write(output, "planning", {"headline": headline, "rows": rows, "growth": growth(repeats)})


if __name__ == "__main__":
    run(Path("out/bench"))
