"""Comparing pairs of pages, 30 layers x 12288 elements of K and V, against reading the same bytes and no more.

The pages lie in an order made for a processor's instructions and do not fit into the cache. The floor reads the pages
of the same pairs, layer by layer, 8 bytes at a time, and keeps only their exclusive or.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from jointkv.core.blocks import served_errors
from jointkv.core.packed import PackedPages
from jointkv.fusion.pair_sums import pair_cosines, pair_errors, pair_sums, pair_sums_reference
from jointkv.system import native
from timing import median_ratio, on_threads, paired, write

LAYERS, TOKENS, HEADS, HEAD_SIZE, PAGES, PAIRS = 30, 32, 3, 64, 256, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
TOLERANCE = 1e-5

READ = """
#include <stdint.h>
void read_pages(const uint8_t *const *layers, int64_t num_layers, int64_t page_bytes, const int64_t *own,
                const int64_t *other, int64_t pairs, uint64_t *result)
{
    uint64_t sum = 0;
    for (int64_t pair = 0; pair < pairs; pair++)
        for (int64_t layer = 0; layer < num_layers; layer++)
            for (int side = 0; side < 2; side++) {
                const uint64_t *page = (const void *)(layers[layer] + (side ? other : own)[pair] * page_bytes);
                for (int64_t i = 0; i < page_bytes / 8; i++)
                    sum ^= page[i];
            }
    *result = sum;
}
"""


def make_layout(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_of` and `is_value` `[elements]` of tokens in the order `name`."""
    token = torch.arange(TOKENS)
    if name == "row-major":
        side = token.repeat_interleave(HEAD_SIZE).repeat(HEADS)
        return side.repeat(2), torch.arange(2 * len(side)) >= len(side)
    # Tiles of 16 tokens; K as [size / 2][token][2], V as [token / 2][size][2].
    tiles = token.view(-1, 1, 16)
    keys = tiles.repeat_interleave(2, dim=2).expand(-1, HEAD_SIZE // 2, -1).flatten()
    values = token.view(-1, 1, 2).expand(-1, HEAD_SIZE, -1).flatten()
    token_of = torch.cat((keys.repeat(HEADS), values.repeat(HEADS)))
    return token_of, torch.arange(len(token_of)) >= len(token_of) // 2


def make_pages(layout: str, dtype: torch.dtype) -> PackedPages:
    token_of, is_value = make_layout(layout)
    return PackedPages([torch.randn(PAGES, len(token_of)).to(dtype) for _ in range(LAYERS)], token_of, is_value)


def check(pages: PackedPages, own: torch.Tensor, other: torch.Tensor) -> float:
    """The largest relative deviation from float64."""
    found = pair_sums(pages, own, other)
    worst = 0.0
    for number, layer in enumerate(pages.layers):
        x, y = layer[own].float().double(), layer[other].float().double()
        for which, part in enumerate((x - y, x, y)):
            expected = torch.zeros(len(own), 2 * TOKENS, dtype=torch.float64)
            expected.index_add_(1, pages.token_of + pages.is_value * TOKENS, part.square())
            deviation = found[:, number, :, :, which].flatten(1) / expected - 1
            worst = max(worst, float(deviation.abs().max()))
    if not worst < TOLERANCE:
        raise SystemExit(f"sums are off by {worst}")
    return worst


def reader(pages: PackedPages) -> Callable[[torch.Tensor, torch.Tensor], None]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "read_pages.c"
        source.write_text(READ)
        function = native.load(source).read_pages
    layers = (ctypes.c_void_p * LAYERS)(*(layer.data_ptr() for layer in pages.layers))
    page_bytes, result = pages.page_nbytes // LAYERS, ctypes.c_uint64()

    def read(own: torch.Tensor, other: torch.Tensor) -> None:
        int64, address = ctypes.c_int64, ctypes.c_void_p
        indices = (address(own.data_ptr()), address(other.data_ptr()))
        function(layers, int64(LAYERS), int64(page_bytes), *indices, int64(len(own)), ctypes.byref(result))

    return read


def measure(layout: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Seconds per pair on one core: all pairs in one call, and one pair a call."""
    pages = make_pages(layout, dtype)
    own, other = torch.randperm(PAGES)[: 2 * PAIRS].view(2, PAIRS)
    read = reader(pages)

    def singly(work: Callable[..., Any]) -> None:
        for pair in range(PAIRS):
            work(own[pair : pair + 1], other[pair : pair + 1])

    def compare(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return pair_sums(pages, own, other)

    def decide() -> None:
        sums = compare(own, other)
        pair_errors(sums, "rms")
        pair_cosines(sums)

    works: dict[str, Callable[[], Any]] = {
        "read": lambda: read(own, other),
        "sums": lambda: compare(own, other),
        "sums_errors_cosines": decide,
        "sums_singly": lambda: singly(compare),
        "reference": lambda: pair_sums_reference(pages, own, other),
        "served_errors": lambda: served_errors(pages, own, other, "rms"),
    }
    worst = check(pages, own, other)
    samples = dict(zip(works, paired(list(works.values()), repeats), strict=True))
    seconds = {name: [sample / PAIRS for sample in taken] for name, taken in samples.items()}
    bytes_read = 2 * pages.page_nbytes
    return {
        "layout": layout,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_read_per_pair": bytes_read,
        "worst_deviation_from_float64": worst,
        "seconds_per_pair": seconds,
        "gigabytes_per_second": {name: bytes_read / median(taken) / 1e9 for name, taken in seconds.items()},
        "sums_over_read": median_ratio(seconds["sums"], seconds["read"]),
    }


def run(output: Path, repeats: int = 5) -> None:
    with on_threads(1):
        rows = [measure("tiled", dtype, repeats) for dtype in DTYPES]
        rows.append(measure("row-major", torch.bfloat16, repeats))
    headline = {
        f"{row['layout']}, {row['dtype']}, {row['bytes_read_per_pair'] / 1e6:.2f} MB": {
            **{f"ms_{name}": round(1e3 * median(taken), 3) for name, taken in row["seconds_per_pair"].items()},
            "GB/s": round(row["gigabytes_per_second"]["sums"], 1),
            "over_read": round(row["sums_over_read"], 2),
        }
        for row in rows
    }
    write(output, "pair_sums", {"headline": headline, "rows": rows})


if __name__ == "__main__":
    run(Path("out/bench"))
