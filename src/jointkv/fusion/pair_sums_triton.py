"""`pair_sums` on a GPU, and how Triton kernels read the elements of pages.

A program takes some tokens of K, or of V, of one layer of one pair; the tables of the layout say where they lie.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointkv.core.blocks import RESOLUTION, SMALLEST
from jointkv.core.packed import BITS, PackedPages

TOKENS, NUMBERS = 16, 64
"""Of a tile. The numbers of a token are added up in so many places before these are."""

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


def addresses(layers: Sequence[Tensor]) -> Tensor:
    """Where the layers begin, `[layers]` long on their device."""
    return torch.tensor([layer.data_ptr() for layer in layers]).to(layers[0].device, non_blocking=True)


def bits_of(layer: Tensor) -> Tensor:
    """`layer` as `read` takes it: plain bits where its type is one of `UNPACKED`."""
    return layer.view(BITS[layer.itemsize]) if layer.dtype in UNPACKED else layer


def pair_sums(pages: PackedPages, own: Tensor, other: Tensor) -> Tensor:
    """What `jointkv.fusion.pair_sums.pair_sums` returns; `own` and `other` are known to be right."""
    device, tokens = pages.device, pages.block_size
    sums = torch.empty(len(own), pages.num_layers, 2, tokens, 3, device=device)
    if not len(own):
        return sums.cpu()
    first, order = pages.layers[0], pages.order
    key_numbers, value_numbers = (len(side) // tokens for side in order)
    with torch.cuda.device_of(first):
        add_up[(len(own), pages.num_layers, 2 * triton.cdiv(tokens, TOKENS))](
            *(bits_of(first), addresses(pages.layers), first.stride(0)),
            *(torch.cat(order).int(), own.to(device), other.to(device), sums),
            *(tokens, key_numbers, value_numbers, RESOLUTION, SMALLEST),
            unpacked=UNPACKED.get(pages.dtype, ""),
            tile=TOKENS,
            width=NUMBERS,
        )
    return sums.cpu()
