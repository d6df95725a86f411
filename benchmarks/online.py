"""Online search: one new block among 10,000 resident ones, beside its share of the prefill of an 800-token prompt."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch

from jointkv.core.pool import BlockPool
from jointkv.core.table import BlockTable
from jointkv.fusion.fuser import Fuser, NewBlocks
from jointkv.hf.models import load_model
from jointkv.policy import FusionPolicy
from jointkv.system.machine import fast_dtype
from timing import paired, write

LAYERS, BLOCK_SIZE, HEADS, HEAD_SIZE = 30, 16, 3, 64
RESIDENT = 10_000
PROMPT_BLOCKS = 50


def fill(pool: BlockPool, table: BlockTable, blocks: int) -> None:
    """Give every row `blocks` blocks of random K and V."""
    table.extend(torch.full((table.num_rows,), blocks))
    pages = table.held()
    for layer in (*pool.kv.keys, *pool.kv.values):
        layer[pages] = torch.randn(len(pages), *layer.shape[1:]).to(layer.dtype)


def resident_index(buckets: int) -> tuple[BlockPool, Fuser, BlockTable]:
    """A pool with RESIDENT unrelated blocks, spread over `buckets` positions."""
    # Few distinct pages stand for all: an index entry costs the same, and 10,000 pages would be 3.7 GB.
    pool = BlockPool(LAYERS, BLOCK_SIZE, (HEADS, HEAD_SIZE), (HEADS, HEAD_SIZE), dtype=torch.bfloat16)
    fuser = Fuser(pool, FusionPolicy.preset("safe"))
    signatures = torch.nn.functional.normalize(torch.randn(RESIDENT, fuser.signature.size), dim=1)
    held = BlockTable(pool, 64)
    fill(pool, held, 1)
    pages = torch.arange(RESIDENT) + 1_000_000
    pages[0], signatures[:1] = held.pages[0, 0], fuser.signature(pool.kv, held.pages[0])
    fuser.index.add([("", place) for place in range(buckets)], torch.arange(RESIDENT) % buckets, pages, signatures)
    return pool, fuser, held


def measure(buckets: int, repeats: int) -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    pool, fuser, held = resident_index(buckets)
    model, _ = load_model("smollm2", dtype=fast_dtype())
    tokens = torch.randint(0, model.config.vocab_size, (1, PROMPT_BLOCKS * BLOCK_SIZE))
    table = BlockTable(pool, 1)
    fill(pool, table, 1)
    page = table.held()
    # Close enough to one resident block to be verified in full, too far to be served by it.
    for layer in (*pool.kv.keys, *pool.kv.values):
        layer[page] = layer[held.pages[0]] + 0.25 * torch.randn(1, *layer.shape[1:]).to(layer.dtype)

    def add_one() -> None:
        fuser.fuse(table, NewBlocks(torch.tensor([0]), torch.tensor([0]), [("", 0)], torch.tensor([0])))
        fuser.forget(page)

    @torch.inference_mode()
    def prefill() -> None:
        model(input_ids=tokens, use_cache=True, logits_to_keep=1)

    add_one()
    if not fuser.counters["rejected_by_bound"]:
        raise RuntimeError("the near block was not verified")
    added, prefilled = paired([add_one, prefill], repeats, warmup=2)
    return added, [seconds / PROMPT_BLOCKS for seconds in prefilled]


def run(output: Path, repeats: int = 5) -> None:
    rows = []
    for buckets in (1, 50):
        added, prefilled = measure(buckets, repeats)
        rows.append(
            {
                "resident": RESIDENT,
                "resident_in_bucket": RESIDENT // buckets,
                "seconds_add": added,
                "seconds_prefill_of_block": prefilled,
                "share_of_prefill": median(added) / median(prefilled),
            }
        )
    headline = {f"{row['resident_in_bucket']} at the position": round(row["share_of_prefill"], 3) for row in rows}
    write(output, "online", {"headline": headline, "rows": rows})


if __name__ == "__main__":
    run(Path("out/bench"))
