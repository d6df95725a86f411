"""The kernels for pages on a GPU, in Triton.

A program of `add_up` takes some tokens of K, or of V, of one layer of one pair; the tables of the layout say where they
lie. One of `project` takes some blocks of a layer, K or V, and some columns of their projection.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointkv.core.blocks import RESOLUTION, SMALLEST, KVPages
from jointkv.core.packed import BITS, PackedPages, addresses
from jointkv.fusion.kernels import SignatureKernel

TOKENS, NUMBERS = 16, 64
"""Of a tile. The numbers of a token are added up in so many places before these are."""

BLOCKS, COLUMNS = 8, 4
"""Of a tile: what is read of a projection serves so many blocks."""

UNPACKED = {torch.bfloat16: "bfloat16", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
"""Types that `read` takes apart by their bits."""


@triton.jit
def read(pointers: tl.tensor, there: tl.tensor, unpacked: tl.constexpr) -> tl.tensor:
    """Elements in float32, zero where not `there`. Not every GPU knows float8; the interpreter misreads that, and
    subnormal bfloat16. Float8 is float16 with fewer digits, and e4m3 256 times what its bits stand for there."""
    bits = tl.load(pointers, there, 0)
    if unpacked == "bfloat16":
        return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    if unpacked == "e5m2":
        return (bits.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    if unpacked == "e4m3":
        word = bits.to(tl.uint16)
        half = ((word & 0x80) << 8) | ((word & 0x7F) << 7)
        number = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((word & 0x7F) == 0x7F, float("nan"), number)
    return bits.to(tl.float32)


@triton.jit
def page_start(like: tl.tensor, layers: tl.tensor, layer: tl.tensor, page: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """Where a page begins: `layers` holds addresses of tensors whose elements are those of `like`."""
    return tl.load(layers + layer).to(like.dtype) + page * stride


@triton.jit
def add_up(
    like: tl.tensor, layers: tl.tensor, stride: tl.tensor, offsets: tl.tensor, own: tl.tensor, other: tl.tensor,
    sums: tl.tensor, tokens: tl.tensor, key_numbers: tl.tensor, value_numbers: tl.tensor, resolution: tl.tensor,
    smallest: tl.tensor, unpacked: tl.constexpr, tile: tl.constexpr, width: tl.constexpr,
) -> None:  # fmt: skip
    """Writes `sums [pairs, layers, 2, tokens, 3]`; `offsets` are those of all tokens of K, then of all of V."""
    pair, layer, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.cdiv(tokens, tile)
    side = tl.program_id(2) // tiles
    token = tl.program_id(2) % tiles * tile + tl.arange(0, tile)
    numbers = tl.where(side == 0, key_numbers, value_numbers)
    offsets += side * tokens * key_numbers
    x_page = page_start(like, layers, layer, tl.load(own + pair), stride)
    y_page = page_start(like, layers, layer, tl.load(other + pair), stride)
    apart = tl.zeros([tile, width], tl.float32)
    x_squares, y_squares = tl.zeros_like(apart), tl.zeros_like(apart)
    differ = tl.zeros([tile, width], tl.int32)
    for first in range(0, numbers, width):
        number = first + tl.arange(0, width)
        there = (token < tokens)[:, None] & (number < numbers)[None, :]
        offset = tl.load(offsets + token[:, None] * numbers + number[None, :], there, 0)
        x, y = read(x_page + offset, there, unpacked), read(y_page + offset, there, unpacked)
        apart += (x - y) * (x - y)
        x_squares += x * x
        y_squares += y * y
        differ |= (x != y).to(tl.int32)
    difference, norm = tl.sum(apart, 1), tl.sum(x_squares, 1)
    least = tl.maximum(resolution * norm, smallest)
    lifted = tl.where(tl.max(differ, 1) != 0, least, 0.0)
    difference = tl.where(difference < least, lifted, difference)
    at = sums + (((pair * tl.num_programs(1) + layer) * 2 + side) * tokens + token) * 3
    tl.store(at, difference, token < tokens)
    tl.store(at + 1, norm, token < tokens)
    tl.store(at + 2, tl.sum(y_squares, 1), token < tokens)


@triton.jit
def project(
    like: tl.tensor, layers: tl.tensor, stride: tl.tensor, order: tl.tensor, projection: tl.tensor, pages: tl.tensor,
    signatures: tl.tensor, blocks: tl.tensor, elements: tl.tensor, columns: tl.tensor, side: tl.tensor,
    ordered: tl.constexpr, unpacked: tl.constexpr, tile: tl.constexpr, width: tl.constexpr, tile_columns: tl.constexpr,
) -> None:  # fmt: skip
    """Writes one side of `signatures [blocks, 2, layers, columns]`: products of a block, whose elements lie as
    `order` tells where `ordered`, and `projection [r, columns]`, over the norm."""
    block = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    layer, column = tl.program_id(1), tl.program_id(2) * tile_columns + tl.arange(0, tile_columns)
    page = page_start(like, layers, layer, tl.load(pages + block, block < blocks, 0), stride)
    squares = tl.zeros([tile, width], tl.float32)
    products = tl.zeros([tile, width, tile_columns], tl.float32)
    for first in range(0, elements, width):
        element = first + tl.arange(0, width)
        there = element < elements
        offset = tl.load(order + element, there, 0) if ordered else element
        x = read(page[:, None] + offset[None, :], (block < blocks)[:, None] & there[None, :], unpacked)
        known = there[:, None] & (column < columns)[None, :]
        direction = tl.load(projection + element[:, None] * columns + column[None, :], known, 0.0)
        squares += x * x
        products += x[:, :, None] * direction[None, :, :]
    norm = tl.sqrt_rn(tl.sum(squares, 1))[:, None]
    number = tl.where(norm == 0, 0.0, tl.sum(products, 1) / norm)
    at = ((block * 2 + side) * tl.num_programs(1) + layer)[:, None] * columns + column[None, :]
    tl.store(signatures + at, number, (block < blocks)[:, None] & (column < columns)[None, :])


class Kernels:
    """See `jointkv.fusion.kernels.Kernels`."""

    def pair_sums(self, pages: PackedPages, own: Tensor, other: Tensor) -> Tensor:
        device, tokens = pages.device, pages.block_size
        sums = torch.empty(len(own), pages.num_layers, 2, tokens, 3, device=device)
        if not len(own):
            return sums
        first = pages.layers[0]
        key_numbers, value_numbers = (len(side) // tokens for side in pages.order)
        with torch.cuda.device_of(first):
            add_up[(len(own), pages.num_layers, 2 * triton.cdiv(tokens, TOKENS))](
                *(_bits_of(first), pages.starts, first.stride(0)),
                *(pages.offsets, *(pair.to(device, non_blocking=True) for pair in (own, other)), sums),
                *(tokens, key_numbers, value_numbers, RESOLUTION, SMALLEST),
                unpacked=UNPACKED.get(pages.dtype, ""),
                tile=TOKENS,
                width=NUMBERS,
            )
        return sums

    def signatures(self, kv: KVPages, projections: Sequence[Tensor]) -> SignatureKernel:
        columns = projections[0].shape[1]
        orders = [None if side.order is None else side.order.int() for side in kv.sides]

        def take(kv: KVPages, pages: Tensor) -> Tensor:
            pages = pages.to(kv.device)
            signatures = torch.empty(len(pages), 2 * kv.num_layers * columns, device=kv.device)
            grid = (triton.cdiv(len(pages), BLOCKS), kv.num_layers, triton.cdiv(columns, COLUMNS))
            parts = zip(kv.sides, orders, projections, strict=True)
            for number, (side, order, projection) in enumerate(parts):
                first = side.layers[0]
                with torch.cuda.device_of(first):
                    project[grid](
                        *(_bits_of(first), addresses(side.layers), first.stride(0)),
                        *(pages if order is None else order, projection, pages),
                        *(signatures, len(pages), len(projection), columns, number),
                        ordered=order is not None,
                        unpacked=UNPACKED.get(kv.dtype, ""),
                        tile=BLOCKS,
                        width=NUMBERS,
                        tile_columns=COLUMNS,
                    )
            return signatures

        return take


def _bits_of(layer: Tensor) -> Tensor:
    """`layer` as `read` takes it: plain bits where its type is one of `UNPACKED`."""
    return layer.view(BITS[layer.itemsize]) if layer.dtype in UNPACKED else layer
