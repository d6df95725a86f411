"""Finding a prompt of 100,000 tokens among 1,000,000 resident ones at any offset, and turning keys of a real shape.

The floor of finding is reading the prompt's hashes once; that of turning is copying the pages.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
import torch

from jointkv.attention.rotary import Rotary, moved_blocks
from jointkv.core.blocks import PagedKV
from jointkv.core.moved import Fills
from jointkv.fusion.content_index import ContentIndex
from timing import paired, write

TOKENS, RESIDENT, BLOCK_SIZE, LEAST = 100_000, 1_000_000, 32, 64
LAYERS, HEADS, HEAD_SIZE, PAGES = 30, 3, 64, 64


def finding() -> dict[str, float]:
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 50_000, TOKENS) for _ in range(RESIDENT // TOKENS)]
    index, blocks = ContentIndex(BLOCK_SIZE), TOKENS // BLOCK_SIZE
    for number, text in enumerate(texts):
        index.add(
            "key",
            text.reshape(blocks, -1),
            np.arange(blocks),
            np.arange(number * blocks, (number + 1) * blocks),
            number,
        )
    pieces = [text[1000 * number + 13 :][:9_900] for number, text in enumerate(texts)]
    moved = np.concatenate([draw.integers(0, 50_000, 137), *pieces])[:TOKENS]
    strange = draw.integers(0, 50_000, TOKENS)
    assert sum(run.tokens for run in index.find("key", moved, LEAST)) > 0.98 * len(moved)
    assert not index.find("key", strange, LEAST)
    works = [lambda: index.find("key", moved, LEAST), lambda: index.find("key", strange, LEAST), lambda: moved.cumsum()]
    found, nothing, least = (median(times) for times in paired(works, repeats=15, warmup=3, clock="processor"))
    return {
        "find_ms": round(1e3 * found, 2),
        "nothing_resident_ms": round(1e3 * nothing, 2),
        "find_floor_ms": round(1e3 * least, 2),
    }


def turning() -> dict[str, float]:
    shape = (2 * PAGES + 1, BLOCK_SIZE, HEADS, HEAD_SIZE)
    kv = PagedKV(*([torch.randn(shape) for _ in range(LAYERS)] for _ in range(2)))
    rotary = [Rotary(10_000.0 ** -(torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE), False)] * LAYERS
    first, same = np.arange(PAGES), np.full(PAGES, 5)
    fills = Fills(first, first, first + 1, same, same)
    index = torch.from_numpy(first)
    works = [
        lambda: moved_blocks(kv, fills, rotary),
        lambda: [side[index] for layers in (kv.keys, kv.values) for side in layers],
    ]
    turned, copied = (median(times) for times in paired(works, repeats=9, warmup=2, clock="processor"))
    return {"turn_ms": round(1e3 * turned, 2), "copy_ms": round(1e3 * copied, 2), "of_copy": round(copied / turned, 3)}


def run(output: Path) -> None:
    torch.set_num_threads(1)
    sizes = {"tokens": TOKENS, "resident_tokens": RESIDENT, "pages_turned": PAGES, "layers": LAYERS}
    write(output, "moved_text", {"headline": finding() | turning(), **sizes})


if __name__ == "__main__":
    run(Path("out/bench"))
