"""Attention kernels: checked against float64 on fresh random inputs, then timed against the floor and vLLM's own.

`python benchmarks/kernels.py --output docs/results/kernels`; vLLM's own CPU attention takes part where it can be
imported: `.venv-vllm/bin/python benchmarks/kernels.py`. Every page is read by 1, 2, 4, 8 or 32 sequences, except the
last block of each, which it writes itself. The floor is the larger of bytes over the copy bandwidth and operations over
the speed of a large matrix product, both measured here on as many cores. Pages that stay in the processor's cache can
be read faster than the first says.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import kernels_gpu
from jointkv.attention.grouping import group_pages
from jointkv.attention.layouts import LayerPages
from jointkv.attention.paged import paged_attention
from jointkv.attention.work import WorkList
from timing import CLOCKS, machine_speed, median_ratio, on_threads, paired, write

SEQUENCES, BLOCK_SIZE = 32, 32
CONTEXTS = (1024, 2048)
SHARING = (1, 2, 4, 8, 32)
DTYPES = ("float32", "bfloat16")
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
CHECKED = (0, SEQUENCES - 1)
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Heads:
    """One layer's heads."""

    name: str
    query: int
    kv: int
    size: int


SHAPES = (Heads("SmolLM2-135M", 9, 3, 64), Heads("Llama-8B", 32, 8, 128))


class Layer:
    """A layer's pages in the order of vLLM's vector path, filled with random numbers, and queries."""

    def __init__(self, heads: Heads, context: int, dtype: str, generator: torch.Generator) -> None:
        self.heads, self.context, self.dtype = heads, context, getattr(torch, dtype)
        self.slots = -(-context // BLOCK_SIZE)
        shape = (SEQUENCES * self.slots, heads.kv, BLOCK_SIZE, 2 * heads.size)
        self.cache = torch.empty(shape, dtype=self.dtype)
        for page in self.cache:
            page.copy_(torch.randn(page.shape, generator=generator))
        self.pages = LayerPages.of_engine(self.cache, "vec")
        self.query = torch.randn(SEQUENCES, heads.query, heads.size, generator=generator).to(self.dtype)
        self.lengths = torch.full((SEQUENCES,), context)
        self.rewritten: dict[int, Tensor] = {}
        self.scales = torch.rand(2, SEQUENCES, self.slots, generator=generator) + 0.5

    def tables(self, sharing: int) -> Tensor:
        """Block tables in which each page but the last of a sequence serves `sharing` sequences; scattered pages."""
        pages = torch.randperm(len(self.cache), generator=torch.Generator().manual_seed(sharing))
        tables = pages.view(SEQUENCES, self.slots)
        shared = tables[torch.arange(SEQUENCES) // sharing * sharing].clone()
        shared[:, -1] = tables[:, -1]
        return shared

    def work(self, tables: Tensor, share: bool) -> WorkList:
        group = self.heads.query // self.heads.kv
        return group_pages(tables, self.lengths, BLOCK_SIZE, heads_per_kv_head=group, share=share)

    def attend(self, work: WorkList, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Tensor:
        return paged_attention(self.query, self.pages, work, k_scale=k_scale, v_scale=v_scale)[0]

    def truth(self, tables: Tensor, row: int, scaled: bool) -> Tensor:
        """Attention of one sequence in float64, `[query heads, d]`."""
        keys, values = (part[tables[row]].double() for part in self.pages.read())
        if scaled:
            k_scale, v_scale = self.scales[:, row, :, None, None, None]
            keys, values = keys * k_scale, values * v_scale
        keys, values = (part.flatten(0, 1)[: self.context].transpose(0, 1) for part in (keys, values))
        query = self.query[row].double().view(self.heads.kv, -1, self.heads.size)
        return ((query @ keys.mT * self.heads.size**-0.5).softmax(-1) @ values).flatten(0, 1)

    def check(self, found: Tensor, tables: Tensor, scaled: bool, name: str) -> float:
        """The largest relative error of a head of the sequences that are checked."""
        worst = 0.0
        for row in CHECKED:
            truth = self.truth(tables, row, scaled)
            apart = torch.linalg.vector_norm(found[row].double() - truth, dim=-1)
            worst = max(worst, float((apart / torch.linalg.vector_norm(truth, dim=-1)).max()))
        if not worst < TOLERANCE[str(self.dtype).removeprefix("torch.")]:
            raise SystemExit(f"{name} is off by {worst}")
        return worst

    def floor(self, distinct: int, speed: dict[str, float]) -> dict[str, float]:
        """Bytes of the pages that are read and of queries and outputs; operations of both products."""
        page = self.cache[0].nbytes
        moved = distinct * page + 2 * self.query.nbytes
        operations = 4 * SEQUENCES * self.context * self.heads.query * self.heads.size
        seconds = (moved / speed["copy_bytes_per_s"], operations / speed["operations_per_s"])
        return {
            "bytes_moved": moved,
            "operations": operations,
            "floor_bytes_seconds": seconds[0],
            "floor_operations_seconds": seconds[1],
            "floor_seconds": max(seconds),
        }


def stock_paths() -> dict[str, int]:
    """Block sizes of the paths of vLLM's own op that run here, empty without vLLM."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import _custom_ops  # noqa: F401
    except ImportError:
        return {}
    return {"vec": 32, "vec16": 16}


def stock(layer: Layer, tables: Tensor, isa: str, block_size: int) -> Callable[[], Tensor]:
    """vLLM's own op over the same pages; with smaller blocks over pages that it wrote itself."""
    from vllm import _custom_ops as ops

    heads, cache = layer.heads, layer.cache
    if block_size != BLOCK_SIZE:
        if block_size not in layer.rewritten:
            layer.rewritten[block_size] = _rewritten(layer, isa, block_size)
        cache = layer.rewritten[block_size]
        parts = BLOCK_SIZE // block_size
        tables = (tables[:, :, None] * parts + torch.arange(parts)).flatten(1)
    keys, values = cache.view(len(cache), heads.kv, 2 * block_size, heads.size).chunk(2, dim=2)
    starts = torch.arange(SEQUENCES + 1, dtype=torch.int32)
    lengths, table = layer.lengths.int(), tables.int()
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=SEQUENCES, num_heads=heads.query, num_kv_heads=heads.kv, head_dim=heads.size, seq_lens=lengths,
        dtype=layer.dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip
    output = torch.empty_like(layer.query)

    def attend() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            query=layer.query, key_cache=keys, value_cache=values, output=output, query_start_loc=starts,
            seq_lens=lengths, scale=heads.size**-0.5, causal=True, alibi_slopes=None, sliding_window=-1,
            block_table=table, softcap=0.0, scheduler_metadata=plan, s_aux=None,
        )  # fmt: skip
        return output

    return attend


def _rewritten(layer: Layer, isa: str, block_size: int) -> Tensor:
    """The tokens of all pages in blocks of another size, written by vLLM."""
    from vllm import _custom_ops as ops

    heads, parts = layer.heads, BLOCK_SIZE // block_size
    cache = torch.empty(len(layer.cache) * parts, heads.kv, block_size, 2 * heads.size, dtype=layer.dtype)
    keys, values = cache.view(len(cache), heads.kv, 2 * block_size, heads.size).chunk(2, dim=2)
    read = layer.pages.read()
    for page in range(len(layer.cache)):
        key, value = (part[page].contiguous() for part in read)
        slots = torch.arange(page * BLOCK_SIZE, (page + 1) * BLOCK_SIZE)
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, isa)
    return cache


def arms(layer: Layer, tables: Tensor, paths: dict[str, int]) -> dict[str, tuple[Callable[[], Tensor], bool]]:
    """What is timed, and whether it applies scales."""
    works = {}
    for name, share in (("alone", False), ("shared", True)):
        work = layer.work(tables, share)
        works[name] = (partial(layer.attend, work), False)
        works[f"{name}_scaled"] = (partial(layer.attend, work, *layer.scales), True)
    for isa, block_size in paths.items():
        works[f"stock_{isa}"] = (stock(layer, tables, isa, block_size), False)
    return works


def measure(
    layer: Layer, sharing: int, paths: dict[str, int], repeats: int, clock: str, speed: dict[str, float]
) -> dict[str, Any]:
    """Checked, then timed in turns."""
    tables = layer.tables(sharing)
    works = arms(layer, tables, paths)
    errors = {name: layer.check(run(), tables, scaled, name) for name, (run, scaled) in works.items()}
    samples = dict(zip(works, paired([run for run, _ in works.values()], repeats, clock=clock), strict=True))
    best = min((name for name in works if name.startswith("stock")), key=lambda n: median(samples[n]), default=None)
    ratios = {}
    if best is not None:
        ratios = {name: median_ratio(samples[name], samples[best]) for name in works if not name.startswith("stock")}
    grouping = paired([lambda: layer.work(tables, True)], clock=clock)[0]
    floor = layer.floor(len(tables.unique()), speed)
    return {
        "heads": layer.heads.name,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "context": layer.context,
        "cores": torch.get_num_threads(),
        "sequences_per_page": sharing,
        "relative_error": errors,
        "seconds": samples,
        "best_stock_path": best or NOT_MEASURED,
        "over_stock": ratios or NOT_MEASURED,
        "over_floor": {name: median(taken) / floor["floor_seconds"] for name, taken in samples.items()},
        "grouping_seconds": median(grouping),
        **floor,
    }


def show(row: dict[str, Any]) -> None:
    times = "  ".join(f"{name} {1e3 * median(taken):.2f}" for name, taken in row["seconds"].items())
    print(
        f"{row['heads']} {row['dtype']} {row['context']} on {row['cores']}, {row['sequences_per_page']} a page: "
        f"{row['bytes_moved'] / 1e6:.1f} MB, {row['operations'] / 1e9:.2f} Gop, "
        f"floor {1e3 * row['floor_seconds']:.2f} ms; ms: {times}; over floor: {row['over_floor']['shared']:.2f}",
        flush=True,
    )


def measure_cpu(repeats: int, options: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator()
    generator.seed()
    paths, rows, speeds = stock_paths(), [], {}
    for threads in options.cores:
        with on_threads(threads):
            speeds[str(threads)] = machine_speed(clock=options.clock)
    for heads in (shape for shape in SHAPES if shape.name in options.heads):
        for dtype in options.dtypes:
            for context in options.contexts:
                layer = Layer(heads, context, dtype, generator)
                for threads in options.cores:
                    for sharing in options.sharing:
                        with on_threads(threads):
                            rows.append(measure(layer, sharing, paths, repeats, options.clock, speeds[str(threads)]))
                        show(rows[-1])
    return {"clock": options.clock, "measured_speed": speeds, "rows": rows}


def measure_gpu(repeats: int) -> dict[str, Any] | str:
    return kernels_gpu.measure(torch.device("cuda"), repeats) if torch.cuda.is_available() else NOT_MEASURED


def goals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst ratio of each goal over its rows: norm-aware to stock, unshared to stock, stock to shared at four."""
    told = [row for row in rows if row["over_stock"] != NOT_MEASURED and row["dtype"] == "float32"]
    single, four = ([row for row in told if row["sequences_per_page"] == n] for n in (1, 4))
    return {
        "norm_aware_over_stock": max((row["over_stock"]["alone_scaled"] for row in single), default=NOT_MEASURED),
        "shared_over_stock_when_nothing_is": max((row["over_stock"]["shared"] for row in single), default=NOT_MEASURED),
        "stock_over_shared_at_four": min((1 / row["over_stock"]["shared"] for row in four), default=NOT_MEASURED),
    }


def run(output: Path, repeats: int = 5, options: argparse.Namespace | None = None) -> None:
    options = options or arguments([])
    gpu = measure_gpu(repeats)
    if options.device == "cuda":
        write(output, "kernels_gpu", gpu if isinstance(gpu, dict) else {"headline": {"gpu": gpu}})
        return
    cpu = measure_cpu(repeats, options)
    write(output, "kernels", {"headline": goals(cpu["rows"]), "cpu": cpu, "gpu": gpu})


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="+", default=[shape.name for shape in SHAPES])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--sharing", type=int, nargs="+", default=list(SHARING), help="sequences a page; divide 32")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted({1, min(2, os.cpu_count() or 1)}))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the GPU's rows only")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: on one core of a busy machine")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    return parser.parse_args(given)


if __name__ == "__main__":
    chosen = arguments()
    run(chosen.output, chosen.repeats, chosen)
