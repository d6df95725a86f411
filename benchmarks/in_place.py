"""Decoding behind one long text that stands at another position in every request: read in place, or from copies.

One layer of SmolLM2-135M on one core. The floor is the same text at equal positions, which is read once for all. The
list of who reads what is made for larger batches as well; its floor is a copy of what it is made from and of what it
holds.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jointkv.attention.grouping import group_pages
from jointkv.attention.in_place import Ranges, in_ranges
from jointkv.attention.layouts import LayerPages
from jointkv.attention.paged import paged_attention
from jointkv.attention.rotary import Rotary, Turning, moved_blocks
from jointkv.attention.work import Turn, WorkList
from jointkv.core.blocks import PagedKV
from jointkv.core.moved import Fills, MovedRun
from timing import median_ratio, paired, write

REQUESTS, TEXT, HEAD, TAIL, BLOCK_SIZE = 24, 704, 33, 96, 32
HEADS, GROUP, SIZE = 3, 3, 64

LISTS = {"24x27": (24, 704, 1), "24x300": (24, 9440, 4), "128x75": (128, 2144, 4), "256x300": (256, 9216, 4)}
"""Requests, tokens of text that moved, and in how many runs, each at a shift of its own; named by rows and slots."""


class Tables(NamedTuple):
    """Block tables `[rows, slots]` of requests with text that moved, its first copy in pages `0 .. text - 1`."""

    tables: Tensor
    lengths: Tensor
    moved: dict[int, Fills]

    @classmethod
    def of(cls, requests: int, text: int, runs: int = 1) -> Tables:
        pages, each = text // BLOCK_SIZE, text // BLOCK_SIZE // runs
        slots = -(-(HEAD + requests + text + TAIL) // BLOCK_SIZE)
        tables = pages + torch.arange(requests * slots).view(requests, slots)
        moved = {}
        for row in range(requests):
            parts = []
            for run in range(runs):  # each lacks some tokens more at its head, and so stands at a shift of its own
                start, held = HEAD + row + run * each * BLOCK_SIZE, np.arange(run * each, (run + 1) * each)
                parts.append(MovedRun(start, each * BLOCK_SIZE - run, 0, run, held, HEAD + row - run).fills(BLOCK_SIZE))
            moved[row] = Fills.join(parts)
        return cls(tables, torch.arange(requests) + HEAD + text + TAIL, moved)

    def ranges(self) -> Ranges:
        return in_ranges(self.tables, BLOCK_SIZE, self.moved)

    def group(self, ranges: Ranges | None = None) -> WorkList:
        group = partial(group_pages, lengths=self.lengths, block_size=BLOCK_SIZE, heads_per_kv_head=GROUP)
        if ranges is None:
            return group(self.tables)
        return group(ranges.pages, first=ranges.first, count=ranges.count, shift=ranges.shift)

    def grouped(self) -> WorkList:
        return self.group(self.ranges())


def lists(repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of one making of the list and of its parts, for batches of `LISTS`."""
    found = {}
    for name, sizes in LISTS.items():
        case = Tables.of(*sizes)
        ranges = case.ranges()
        work = case.group(ranges)
        work.check_integrity()
        read = [part.numpy() for part in (ranges.pages, ranges.first, ranges.count, ranges.shift)]
        parts = (work.items, work.pages, work.queries, work.entries, work.merge)
        arrays = [*read, *(array for part in parts for array in part), work.turned, work.turned_by]
        works = {
            "ranges": case.ranges,
            "group": partial(case.group, ranges),
            "group_copies": case.group,
            "floor": lambda arrays=arrays: [array.copy() for array in arrays],
        }
        found[name] = dict(zip(works, paired(list(works.values()), repeats, warmup=3, clock="processor"), strict=True))
    return found


def run(output: Path, repeats: int = 15) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rotary = Rotary(10_000.0 ** -(torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE), False)
    case, text = Tables.of(REQUESTS, TEXT), TEXT // BLOCK_SIZE
    tables, lengths, _ = case
    shape = (text + tables.numel(), BLOCK_SIZE, HEADS, SIZE)
    keys, values = torch.randn(2, *shape, generator=generator)
    query = torch.randn(REQUESTS, HEADS * GROUP, SIZE, generator=generator)
    for row, fills in case.moved.items():
        blocks = moved_blocks(PagedKV([keys], [values]), fills, [rotary])
        keys[tables[row, fills.slots]], values[tables[row, fills.slots]] = blocks.keys[0], blocks.values[0]
    pages = LayerPages.of_pool(keys, values)
    equal = tables.clone()
    equal[:, 2 : 2 + text - 1] = torch.arange(text - 1)

    def in_place() -> tuple[Tensor, Tensor]:
        return attend(moved, turning.of(0))

    def attend(work: WorkList, turn: Turn | None = None) -> tuple[Tensor, Tensor]:
        return paged_attention(query, pages, work, turn=turn)

    moved, copied, same = case.grouped(), case.group(), case._replace(tables=equal).group()
    turning = Turning([rotary], moved.turning[1])
    torch.testing.assert_close(in_place()[0], attend(copied)[0], rtol=1e-4, atol=1e-4)
    works = {
        "in_place": in_place,
        "copies": partial(attend, copied),
        "equal_position": partial(attend, same),
        "group_in_place": case.grouped,
        "group_copies": case.group,
    }
    samples = dict(zip(works, paired(list(works.values()), repeats, warmup=3, clock="processor"), strict=True))
    headline = {f"{name}_ms": round(1e3 * median(times), 3) for name, times in samples.items()}
    for name in ("copies", "equal_position"):
        headline[f"in_place_over_{name}"] = round(median_ratio(samples["in_place"], samples[name]), 3)
    makings = lists(repeats)
    for name, made in makings.items():
        headline |= {f"{part}_{name}_ms": round(1e3 * median(times), 3) for part, times in made.items()}
    sizes = {"requests": REQUESTS, "text": TEXT, "context": int(lengths.max()), "block_size": BLOCK_SIZE}
    write(output, "in_place", {"headline": headline, **sizes, "seconds": samples, "lists": makings})


if __name__ == "__main__":
    run(Path("out/bench"))
