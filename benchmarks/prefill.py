"""Reading a prompt: our attention over pages, vLLM's own op and torch's scaled_dot_product_attention, in turns.

`.venv-vllm/bin/python benchmarks/prefill.py --output docs/results/kernels`; vLLM's op takes part where it can be
imported. One sequence of `context` tokens, the last `queries` of which are computed: a whole prompt, or a chunk of a
longer one. torch is given K and V laid out as it likes them, not pages. Everything is checked against float64 first.
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
from torch.nn.functional import scaled_dot_product_attention

from jointkv.attention.grouping import group_pages
from jointkv.attention.layouts import LayerPages
from jointkv.attention.paged import paged_attention
from kernels import BLOCK_SIZE, SHAPES, TOLERANCE, Heads, stock_paths
from timing import CLOCKS, median_ratio, on_threads, paired, write

CASES = ((512, 512), (256, 2048), (2048, 2048))
"""Queries and context."""

TORCH = "torch"


class Prompt:
    """One sequence in pages of a layer, in the order of vLLM's vector path."""

    def __init__(self, heads: Heads, queries: int, context: int, dtype: str) -> None:
        self.heads, self.queries, self.context, self.dtype = heads, queries, context, getattr(torch, dtype)
        slots = -(-context // BLOCK_SIZE)
        self.cache = torch.randn(slots, heads.kv, BLOCK_SIZE, 2 * heads.size).to(self.dtype)
        self.pages = LayerPages.of_engine(self.cache, "vec")
        self.table = torch.randperm(slots)[None]
        self.query = torch.randn(queries, heads.query, heads.size).to(self.dtype)

    def states(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Query, K and V, `[1, heads, tokens, d]`."""
        parts = [self.query, *(part[self.table[0]].flatten(0, 1)[: self.context] for part in self.pages.read())]
        return tuple(part.transpose(0, 1)[None].to(dtype).contiguous() for part in parts)

    def ours(self) -> Callable[[], Tensor]:
        work = group_pages(
            self.table,
            torch.tensor([self.context]),
            BLOCK_SIZE,
            query_lengths=torch.tensor([self.queries]),
            heads_per_kv_head=self.heads.query // self.heads.kv,
        )
        return lambda: paged_attention(self.query, self.pages, work)[0]

    def by_torch(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        query, key, value = self.states(dtype)
        if self.queries == self.context:
            masked: dict[str, Any] = {"is_causal": True}
        else:
            masked = {"attn_mask": torch.ones(self.queries, self.context).tril(self.context - self.queries).bool()}
        attend = partial(scaled_dot_product_attention, query, key, value, enable_gqa=True, **masked)
        return lambda: attend()[0].transpose(0, 1)

    def stock(self, isa: str) -> Callable[[], Tensor]:
        from vllm import _custom_ops as ops

        heads, output = self.heads, torch.empty_like(self.query)
        keys, values = self.cache.view(len(self.cache), heads.kv, 2 * BLOCK_SIZE, heads.size).chunk(2, dim=2)
        starts, lengths = torch.tensor([0, self.queries]).int(), torch.tensor([self.context]).int()
        known: dict[str, Any] = {"query_start_loc": starts, "seq_lens": lengths, "causal": True}
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1, num_heads=heads.query, num_kv_heads=heads.kv, head_dim=heads.size, dtype=self.dtype,
            sliding_window_size=-1, isa=isa, enable_kv_split=True, **known,
        )  # fmt: skip

        def attend() -> Tensor:
            ops.cpu_attention_with_kv_cache(
                query=self.query, key_cache=keys, value_cache=values, output=output, scale=heads.size**-0.5,
                alibi_slopes=None, sliding_window=-1, block_table=self.table.int(), softcap=0.0,
                scheduler_metadata=plan, s_aux=None, **known,
            )  # fmt: skip
            return output

        return attend


def measure(prompt: Prompt, repeats: int, clock: str) -> dict[str, Any]:
    """Checked, then timed in turns."""
    works = {"pages": prompt.ours(), TORCH: prompt.by_torch(prompt.dtype)}
    works |= {f"stock_{isa}": prompt.stock(isa) for isa, size in stock_paths().items() if size == BLOCK_SIZE}
    truth, dtype = prompt.by_torch(torch.float64)(), str(prompt.dtype).removeprefix("torch.")
    errors = {}
    for name, work in works.items():
        apart = torch.linalg.vector_norm(work().double() - truth, dim=-1) / torch.linalg.vector_norm(truth, dim=-1)
        errors[name] = float(apart.max())
        if name == "pages" and not errors[name] < TOLERANCE[dtype]:
            raise SystemExit(f"{name} is off by {errors[name]}")
    samples = dict(zip(works, paired(list(works.values()), repeats, clock=clock), strict=True))
    row = {
        "heads": prompt.heads.name,
        "dtype": dtype,
        "queries": prompt.queries,
        "context": prompt.context,
        "cores": torch.get_num_threads(),
        "relative_error": errors,
        "seconds": samples,
        "over": {name: median_ratio(samples["pages"], taken) for name, taken in samples.items() if name != "pages"},
    }
    times = "  ".join(f"{name} {1e3 * median(taken):.2f}" for name, taken in samples.items())
    print(
        f"{prompt.heads.name} {dtype} {prompt.queries} of {prompt.context} on {row['cores']}: ms: {times}", flush=True
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCE), default=["float32"])
    parser.add_argument("--cores", type=int, nargs="+", default=sorted({1, min(2, os.cpu_count() or 1)}))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: on one core of a busy machine")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    rows = []
    for heads in SHAPES:
        for dtype in options.dtypes:
            for queries, context in CASES:
                prompt = Prompt(heads, queries, context, dtype)
                for cores in options.cores:
                    with on_threads(cores):
                        rows.append(measure(prompt, options.repeats, options.clock))
    worst = {name: max(row["over"][name] for row in rows) for name in rows[0]["over"]}
    write(options.output, "prefill", {"headline": {"pages_over": worst}, "clock": options.clock, "rows": rows})


if __name__ == "__main__":
    main()
