"""Signatures of blocks by the kernel that reads each page once, against plain torch, which gathers them as float32, and
against a floor.

The pages do not fit into the cache. Copying the same pages reads and writes their bytes; the floor of reading them is
half of its time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from jointkv.core.blocks import PagedKV
from jointkv.fusion.signature import BlockSignature
from timing import median_ratio, paired, write

POOL_BYTES, READ_BYTES = 256 << 20, 64 << 20
TOLERANCE = 1e-5
"""Of a signature's distance to that in float64, over its norm."""


class Shape(NamedTuple):
    layers: int
    tokens: int
    heads: int
    size: int


SHAPES = {
    "SmolLM2-135M": Shape(30, 32, 3, 64),
    "8B model": Shape(32, 16, 8, 128),
    "SmolLM2-135M, one layer": Shape(1, 32, 3, 64),
}
DTYPES = (torch.bfloat16, torch.float32)


def make_pages(shape: Shape, dtype: torch.dtype) -> PagedKV:
    page = shape.tokens * shape.heads * shape.size * dtype.itemsize * 2 * shape.layers
    layers = [torch.randn(POOL_BYTES // page, *shape[1:]).to(dtype) for _ in range(2 * shape.layers)]
    return PagedKV(layers[: shape.layers], layers[shape.layers :])


def deviation(signature: BlockSignature, kv: PagedKV, pages: torch.Tensor) -> dict[str, float]:
    """Of the kernel and of torch, from float64: the largest distance of a signature, over its norm."""
    columns = []
    for vectors, projection in zip(kv.vectors(pages), signature._projections, strict=True):
        unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
        columns.append(unit @ projection.double())
    expected = torch.stack(columns).permute(2, 0, 1, 3).flatten(1)
    found = {"kernel": signature(kv, pages), "torch": signature.reference(kv, pages)}
    worst = {name: float(((x - expected).norm(dim=1) / expected.norm(dim=1)).max()) for name, x in found.items()}
    if not max(worst.values()) < TOLERANCE:
        raise SystemExit(f"signatures are off by {worst}")
    return worst


def measure(name: str, dtype: torch.dtype, threads: int, repeats: int) -> dict[str, Any]:
    """Seconds per block: many blocks in one call, and one block a call."""
    torch.set_num_threads(threads)
    kv = make_pages(SHAPES[name], dtype)
    signature = BlockSignature(kv)
    pages = torch.randperm(kv.num_pages)[: READ_BYTES // kv.page_nbytes]
    copies = [torch.empty(len(pages), *layer.shape[1:], dtype=dtype) for layer in (*kv.keys, *kv.values)]

    def copy() -> None:
        for layer, to in zip((*kv.keys, *kv.values), copies, strict=True):
            torch.index_select(layer, 0, pages, out=to)

    def singly(work: Callable[..., Any]) -> Callable[[], None]:
        def one_by_one() -> None:
            for page in pages.split(1):
                work(kv, page)

        return one_by_one

    works: dict[str, Callable[[], Any]] = {
        "copy": copy,
        "kernel": lambda: signature(kv, pages),
        "torch": lambda: signature.reference(kv, pages),
    }
    if kv.num_layers > 1:
        works |= {"kernel_singly": singly(signature), "torch_singly": singly(signature.reference)}
    worst = deviation(signature, kv, pages[:4])
    samples = dict(zip(works, paired(list(works.values()), repeats), strict=True))
    seconds = {work: [sample / len(pages) for sample in taken] for work, taken in samples.items()}
    return {
        "shape": {"name": name, **SHAPES[name]._asdict()},
        "dtype": str(dtype).removeprefix("torch."),
        "cores": threads,
        "numbers_in_a_signature": signature.size,
        "bytes_read_per_block": kv.page_nbytes,
        "worst_deviation_from_float64": worst,
        "seconds_per_block": seconds,
        "gigabytes_per_second": {work: kv.page_nbytes / median(taken) / 1e9 for work, taken in seconds.items()},
        "torch_over_kernel": median_ratio(seconds["torch"], seconds["kernel"]),
        "kernel_over_floor": 2 * median_ratio(seconds["kernel"], seconds["copy"]),
    }


def run(output: Path, repeats: int = 5) -> None:
    threads = torch.get_num_threads()
    try:
        rows = [
            measure(name, dtype, cores, repeats)
            for cores in sorted({1, threads})
            for name in SHAPES
            for dtype in DTYPES
        ]
    finally:
        torch.set_num_threads(threads)
    headline = {
        f"{row['shape']['name']}, {row['dtype']}, {row['cores']} cores, {row['bytes_read_per_block'] / 1e6:.2f} MB": {
            **{f"ms_{work}": round(1e3 * median(taken), 4) for work, taken in row["seconds_per_block"].items()},
            "GB/s": round(row["gigabytes_per_second"]["kernel"], 1),
            "torch_over_kernel": round(row["torch_over_kernel"], 2),
            "over_floor": round(row["kernel_over_floor"], 2),
        }
        for row in rows
    }
    write(output, "signatures", {"headline": headline, "rows": rows})


if __name__ == "__main__":
    run(Path("out/bench"))
