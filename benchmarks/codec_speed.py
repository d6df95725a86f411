"""How fast codecs encode and decode: random pages of a real shape, on one core, by processor time.

`python benchmarks/codec_speed.py --output docs/results/bench`; seconds. Compressors of a batch's pages run on as many
threads as torch has; two cores give up to twice these numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointkv.attention.rotary import Rotary
from jointkv.codec import CODECS, Aids, Bound, Chooser, Pages, Transform, decode, encode
from jointkv.codec.transform import rows_of
from timing import paired, write

LAYERS, BLOCK, HEADS, SIZE, PAGES = 30, 32, 3, 64, 16


def random_pages(count: int, seed: int) -> Pages:
    """In bfloat16; components of V and K that vary unequally, as real ones do."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0.7, -0.8, SIZE)
    mix = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))[0]
    keys, values = (
        ((torch.randn(LAYERS, count, BLOCK, HEADS, SIZE, generator=draw) * spread) @ mix).bfloat16() for _ in range(2)
    )
    return Pages(keys, values, 64 + BLOCK * torch.arange(count))


def _products(rows: Sequence[Tensor], transform: Transform) -> None:
    """What nothing that goes through the transform can be faster than: one matrix product per layer and side."""
    for numbers, (basis, _) in zip(rows, transform.layers, strict=True):
        torch.mm(basis.T, numbers.T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    still = [Rotary(10_000.0 ** -(torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE), False)] * LAYERS
    transform = Transform.fit(random_pages(PAGES, 1), still)
    pages = random_pages(PAGES, 2)
    near = Pages(pages.keys * 1.02, pages.values * 1.02, pages.positions)
    megabytes = len(pages) * pages.layout.page_nbytes / 1e6
    rates, sizes = {}, {}
    for name, codec in CODECS.items():
        aids = Aids(transform, near)
        messages = encode(codec, pages, aids)
        works = [
            lambda codec=codec, aids=aids: encode(codec, pages, aids),
            lambda m=messages, aids=aids: decode(m, pages.layout, pages.positions, aids),
        ]
        seconds = [min(times) for times in paired(works, arguments.repeats, clock="processor")]
        rates[name] = {way: round(megabytes / s, 1) for way, s in zip(("encode", "decode"), seconds, strict=True)}
        sizes[name] = round(1e6 * megabytes / sum(map(len, messages)), 2)
    rows, chooser = list(rows_of(pages, transform.rotary)), Chooser(Bound(0.4, 0.6), transform)
    works = [lambda: chooser.encode(pages), lambda: _products(rows, transform)]
    chosen, products = paired(works, arguments.repeats, clock="processor")
    headline = {"encode_alone": rates["alone"]["encode"], "decode_alone": rates["alone"]["decode"]}
    headline["encode_within_a_bound"] = round(megabytes / min(chosen), 1)
    headline["matrix_products_alone"] = round(megabytes / min(products), 1)
    shape = {"layers": LAYERS, "block_size": BLOCK, "heads": HEADS, "head_size": SIZE, "pages": PAGES}
    result: dict[str, Any] = {"headline": headline, "megabytes_per_s_and_core": rates, "times_smaller": sizes, **shape}
    write(arguments.output, "codec_speed", result)


if __name__ == "__main__":
    main()
