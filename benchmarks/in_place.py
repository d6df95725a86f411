"""Decoding behind one long text that stands at another position in every request: read in place, or from copies.

One layer of SmolLM2-135M on one core. The floor is the same text at equal positions, which is read once for all.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from jointkv.attention.grouping import group_pages
from jointkv.attention.in_place import in_ranges
from jointkv.attention.layouts import LayerPages
from jointkv.attention.paged import paged_attention
from jointkv.attention.rotary import Rotary, Turning, moved_blocks
from jointkv.attention.work import Turn, WorkList
from jointkv.core.blocks import PagedKV
from jointkv.core.moved import Fills, MovedRun
from timing import median_ratio, paired, write

REQUESTS, TEXT, HEAD, TAIL, BLOCK_SIZE = 24, 704, 33, 96, 32
HEADS, GROUP, SIZE = 3, 3, 64


def run(output: Path, repeats: int = 15) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rotary = Rotary(10_000.0 ** -(torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE), False)
    text, slots = TEXT // BLOCK_SIZE, -(-(HEAD + REQUESTS + TEXT + TAIL) // BLOCK_SIZE)
    runs = [MovedRun(HEAD + i, TEXT, 0, 0, np.arange(text), HEAD + i).fills(BLOCK_SIZE) for i in range(REQUESTS)]
    tables = text + torch.arange(REQUESTS * slots).view(REQUESTS, slots)
    shape = (text + REQUESTS * slots, BLOCK_SIZE, HEADS, SIZE)
    keys, values = torch.randn(2, *shape, generator=generator)
    query = torch.randn(REQUESTS, HEADS * GROUP, SIZE, generator=generator)
    lengths = torch.arange(REQUESTS) + HEAD + TEXT + TAIL
    for row, fills in enumerate(runs):
        blocks = moved_blocks(PagedKV([keys], [values]), fills, [rotary])
        keys[tables[row, fills.slots]], values[tables[row, fills.slots]] = blocks.keys[0], blocks.values[0]
    pages = LayerPages.of_pool(keys, values)
    equal = tables.clone()
    equal[:, 2 : 2 + text - 1] = torch.arange(text - 1)
    group = partial(group_pages, lengths=lengths, block_size=BLOCK_SIZE, heads_per_kv_head=GROUP)

    def in_place() -> tuple[Tensor, Tensor]:
        return attend(moved, turning.of(0))

    def grouped(rows: dict[int, Fills]) -> WorkList:
        ranges = in_ranges(tables, BLOCK_SIZE, rows)
        return group(ranges.pages, first=ranges.first, count=ranges.count, shift=ranges.shift)

    def attend(work: WorkList, turn: Turn | None = None) -> tuple[Tensor, Tensor]:
        return paged_attention(query, pages, work, turn=turn)

    moved, copied, same = grouped(dict(enumerate(runs))), group(tables), group(equal)
    turning = Turning([rotary], moved.turning[1])
    torch.testing.assert_close(in_place()[0], attend(copied)[0], rtol=1e-4, atol=1e-4)
    works = {
        "in_place": in_place,
        "copies": partial(attend, copied),
        "equal_position": partial(attend, same),
        "group_in_place": partial(grouped, dict(enumerate(runs))),
        "group_copies": partial(group, tables),
    }
    samples = dict(zip(works, paired(list(works.values()), repeats, warmup=3, clock="processor"), strict=True))
    headline = {f"{name}_ms": round(1e3 * median(times), 3) for name, times in samples.items()}
    for name in ("copies", "equal_position"):
        headline[f"in_place_over_{name}"] = round(median_ratio(samples["in_place"], samples[name]), 3)
    sizes = {"requests": REQUESTS, "text": TEXT, "context": int(lengths.max()), "block_size": BLOCK_SIZE}
    write(output, "in_place", {"headline": headline, **sizes, "seconds": samples})


if __name__ == "__main__":
    run(Path("out/bench"))
