"""One prefix for all: the attention that finds shared pages by itself against methods made for shared prefixes.

`.venv-vllm/bin/python benchmarks/shared_prefix.py --output docs/results/kernels`. Hydragen and RelayAttention attend to
the prefix once for the queries of all sequences, to each suffix by itself, and merge both by their log-sum-exp. Here
they are given what serves them best: the prefix and the suffixes without pages, suffixes of equal length, and of two
ways to attend to the prefix (torch's `scaled_dot_product_attention`, plain matrix products) the faster one. vLLM's own
cascade attention is the same idea for GPUs only. vLLM's CPU op takes part where it can be imported. Float32; what is
done once for all layers (grouping, gathering the prefix) is not timed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kernels import BLOCK_SIZE, CONTEXTS, SEQUENCES, SHAPES, Layer, stock, stock_paths
from timing import CLOCKS, median_ratio, on_threads, paired, write

OWN_BLOCKS = 2
"""Blocks at the end of each sequence that are its own."""

Parts = tuple[Tensor, Tensor]
"""Outputs `[kv heads, queries, d]` and their log-sum-exp `[kv heads, queries]`."""


def prefix_tables(layer: Layer) -> Tensor:
    """Block tables that begin with the same scattered pages."""
    pages = torch.randperm(len(layer.cache)).view(SEQUENCES, layer.slots)
    tables = pages[:1].repeat(SEQUENCES, 1)
    tables[:, -OWN_BLOCKS:] = pages[:, -OWN_BLOCKS:]
    return tables


class Decomposed:
    """Attention to the prefix once, to each suffix, and both merged."""

    def __init__(self, layer: Layer, tables: Tensor, by_products: bool) -> None:
        heads, self.by_products = layer.heads, by_products
        self.scale, self.dtype, self.shape = heads.size**-0.5, layer.dtype, layer.query.shape
        whole = [part[tables].flatten(1, 2).transpose(1, 2) for part in layer.pages.read()]
        cut = layer.context - OWN_BLOCKS * BLOCK_SIZE
        self.prefix = [part[:1, :, :cut].to(layer.dtype).contiguous() for part in whole]
        self.suffix = [part[:, :, cut : layer.context].to(layer.dtype).contiguous() for part in whole]
        grouped = layer.query.view(SEQUENCES, heads.kv, -1, heads.size)
        self.query, self.together = grouped, grouped.transpose(0, 1).flatten(1, 2)[None].contiguous()

    def __call__(self) -> Tensor:
        attend = self._products if self.by_products else self._sdpa
        output, sums = attend(self.together, *self.prefix)
        own, own_sums = self._sdpa(self.query, *self.suffix)
        heads, group = self.query.shape[1:3]
        output = output.view(heads, SEQUENCES, group, -1).transpose(0, 1)
        sums = sums.view(heads, SEQUENCES, group).transpose(0, 1)
        share = (sums - own_sums).sigmoid()[..., None].to(own.dtype)
        return own.lerp(output, share).reshape(self.shape)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor) -> Parts:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=self.scale)

    def _products(self, query: Tensor, key: Tensor, value: Tensor) -> Parts:
        logits = (query @ key.mT * self.scale).float()
        sums = logits.logsumexp(-1)
        return (logits - sums[..., None]).exp().to(self.dtype) @ value, sums


def works(layer: Layer, tables: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is timed."""
    found = {
        "shared": partial(layer.attend, layer.work(tables, share=True)),
        "decomposed_sdpa": Decomposed(layer, tables, by_products=False),
        "decomposed_products": Decomposed(layer, tables, by_products=True),
    }
    if stock_paths():
        found["stock_vec"] = stock(layer, tables, "vec", BLOCK_SIZE)
    return found


def measure(layer: Layer, repeats: int, clock: str) -> dict[str, Any]:
    """Checked, then timed in turns."""
    tables, dtype = prefix_tables(layer), str(layer.dtype).removeprefix("torch.")
    arms = works(layer, tables)
    errors = {name: layer.check(run(), tables, False, name) for name, run in arms.items()}
    samples = dict(zip(arms, paired(list(arms.values()), repeats, clock=clock), strict=True))
    best = min((name for name in arms if name.startswith("decomposed")), key=lambda name: median(samples[name]))
    row = {
        "heads": layer.heads.name,
        "dtype": dtype,
        "context": layer.context,
        "own_tokens": OWN_BLOCKS * BLOCK_SIZE,
        "cores": torch.get_num_threads(),
        "relative_error": errors,
        "seconds": samples,
        "best_decomposed": best,
        "over_best_decomposed": median_ratio(samples["shared"], samples[best]),
    }
    times = "  ".join(f"{name} {1e3 * median(taken):.2f}" for name, taken in samples.items())
    print(f"{layer.heads.name} {dtype} {layer.context} on {row['cores']}: ms: {times}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs="+", default=sorted({1, min(2, os.cpu_count() or 1)}))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: on one core of a busy machine")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    generator, rows = torch.Generator(), []
    generator.seed()
    for heads in SHAPES:
        for context in CONTEXTS:
            layer = Layer(heads, context, "float32", generator)
            for cores in options.cores:
                with on_threads(cores):
                    rows.append(measure(layer, options.repeats, options.clock))
    worst = max(row["over_best_decomposed"] for row in rows)
    write(options.output, "shared_prefix", {"headline": {"worst": worst}, "clock": options.clock, "rows": rows})


if __name__ == "__main__":
    main()
