"""Signatures of blocks on a GPU straight from their pages."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointkv.errors import LayoutError
from jointkv.fusion.pair_sums_triton import UNPACKED, addresses, bits_of, page_start, read
from jointkv.fusion.signature_pages import ReadablePages, Side, layers_of, sides_of

BLOCKS, ELEMENTS, COLUMNS = 8, 64, 4
"""Of a tile: what is read of the directions serves so many blocks."""


@triton.jit
def project(
    like: tl.tensor, layers: tl.tensor, stride: tl.tensor, offsets: tl.tensor, projection: tl.tensor, pages: tl.tensor,
    signatures: tl.tensor, blocks: tl.tensor, elements: tl.tensor, columns: tl.tensor, side: tl.tensor,
    unpacked: tl.constexpr, tile: tl.constexpr, width: tl.constexpr, tile_columns: tl.constexpr,
) -> None:  # fmt: skip
    """Writes one side of `signatures [blocks, 2, layers, columns]`: products of elements and `projection [r, columns]`,
    both by address, over the norm."""
    block = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    layer, column = tl.program_id(1), tl.program_id(2) * tile_columns + tl.arange(0, tile_columns)
    page = page_start(like, layers, layer, tl.load(pages + block, block < blocks, 0), stride)
    squares = tl.zeros([tile, width], tl.float32)
    products = tl.zeros([tile, width, tile_columns], tl.float32)
    for first in range(0, elements, width):
        element = first + tl.arange(0, width)
        there = element < elements
        offset = tl.load(offsets + element, there, 0)
        x = read(page[:, None] + offset[None, :], (block < blocks)[:, None] & there[None, :], unpacked)
        known = there[:, None] & (column < columns)[None, :]
        direction = tl.load(projection + element[:, None] * columns + column[None, :], known, 0.0)
        squares += x * x
        products += x[:, :, None] * direction[None, :, :]
    norm = tl.sqrt_rn(tl.sum(squares, 1))[:, None]
    number = tl.where(norm == 0, 0.0, tl.sum(products, 1) / norm)
    at = ((block * 2 + side) * tl.num_programs(1) + layer)[:, None] * columns + column[None, :]
    tl.store(signatures + at, number, (block < blocks)[:, None] & (column < columns)[None, :])


class TritonSignatures:
    """Signatures of blocks in pages laid out like those of `kv`.

    Args:
        projections: for K and for V, float32 `[r, columns]` on the pages' device.

    Raises:
        LayoutError: the numbers of a block lie too far apart.
    """

    def __init__(self, kv: ReadablePages, projections: Sequence[Tensor]) -> None:
        sides = sides_of(kv, projections)
        if max(int(side.offsets[-1]) for side in sides) >= 2**31:
            raise LayoutError("the numbers of a block lie 2^31 elements apart")
        self.sides = [Side(offsets.to(kv.device, torch.int32), directions) for offsets, directions in sides]

    def __call__(self, kv: ReadablePages, index: Tensor) -> Tensor:
        """Of the blocks in the pages `index [n]`, long: float32 `[n, size]` on the pages' device."""
        columns = self.sides[0].projection.shape[1]
        pages = index.to(kv.device)
        signatures = torch.empty(len(pages), 2 * kv.num_layers * columns, device=kv.device)
        grid = (triton.cdiv(len(pages), BLOCKS), kv.num_layers, triton.cdiv(columns, COLUMNS))
        for side, (layers, (offsets, projection)) in enumerate(zip(layers_of(kv), self.sides, strict=True)):
            with torch.cuda.device_of(layers[0]):
                project[grid](
                    *(bits_of(layers[0]), addresses(layers), layers[0].stride(0), offsets, projection, pages),
                    *(signatures, len(pages), len(offsets), columns, side),
                    unpacked=UNPACKED.get(kv.dtype, ""),
                    tile=BLOCKS,
                    width=ELEMENTS,
                    tile_columns=COLUMNS,
                )
        return signatures
