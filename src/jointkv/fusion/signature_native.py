"""Signatures of blocks on the CPU straight from their pages, by the kernel of signature.c."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from jointkv.core.packed import LANES, PACKED_DTYPES, lane_order
from jointkv.errors import NativeUnavailable
from jointkv.fusion.signature_pages import ReadablePages, Side, layers_of, sides_of
from jointkv.system import native

SOURCE = Path(__file__).with_name("signature.c")
COLUMNS, WIDTH = 4, 8
"""As in signature.c."""

MOST_LENGTH = 32 * LANES
"""Of a run: the directions of one, 16 KiB, stay in the first-level cache while the pages of a group pass."""


class _BlockSide(ctypes.Structure):
    """`block_side` of signature.c."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("page_bytes", "runs", "rows")),
        *((name, ctypes.c_void_p) for name in ("start", "length", "projection")),
    )


Kernel = Callable[..., None]


@functools.cache
def kernel() -> Kernel | None:
    """The compiled kernel; None where there is none."""
    try:
        found = native.load(SOURCE).jointkv_signatures
    except NativeUnavailable:
        return None
    address, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.argtypes = [ctypes.POINTER(_BlockSide), int64, int32, address, int64, int64, address, int32]
    found.restype = None
    return found


class NativeSignatures:
    """Signatures of blocks in pages laid out like those of `kv`, by `kernel`.

    Args:
        projections: for K and for V, float32 `[r, columns]`.
    """

    def __init__(self, kernel: Kernel, kv: ReadablePages, projections: Sequence[Tensor]) -> None:
        self.kernel = kernel
        self.columns = projections[0].shape[1]
        self.tables = [_tables(side, kv.dtype) for side in sides_of(kv, projections)]

    def __call__(self, kv: ReadablePages, index: Tensor) -> Tensor:
        """Of the blocks in the pages `index [n]`, contiguous int64 on the CPU: float32 `[n, size]`."""
        signatures = torch.empty(len(index), 2 * kv.num_layers * self.columns)
        layers = [(ctypes.c_void_p * kv.num_layers)(*(part.data_ptr() for part in side)) for side in layers_of(kv)]
        sides = (_BlockSide * 2)(
            *(
                _BlockSide(
                    *(ctypes.addressof(pointers), side[0].stride(0) * side[0].itemsize),
                    *(len(tables.start), tables.projection.shape[1]),
                    *(table.data_ptr() for table in tables),
                )
                for pointers, side, tables in zip(layers, layers_of(kv), self.tables, strict=True)
            )
        )
        self.kernel(
            *(sides, kv.num_layers, PACKED_DTYPES.index(kv.dtype), index.data_ptr(), len(index), self.columns),
            *(signatures.data_ptr(), torch.get_num_threads()),
        )
        return signatures


class _Tables(NamedTuple):
    """Of one side, as signature.c tells them."""

    start: Tensor
    length: Tensor
    projection: Tensor


def _tables(side: Side, dtype: torch.dtype) -> _Tables:
    end = torch.tensor([len(side.offsets)])
    first = torch.nn.functional.pad((side.offsets.diff() != 1).nonzero()[:, 0] + 1, (1, 0))
    pieces = -(-first.diff(append=end) // MOST_LENGTH)
    piece = torch.arange(int(pieces.sum())) - (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
    first = first.repeat_interleave(pieces) + piece * MOST_LENGTH
    length = first.diff(append=end)
    rows = -(-length // LANES)
    moved = (rows.cumsum(0) - rows) * LANES - first
    place = torch.arange(len(side.offsets)) + moved.repeat_interleave(length)
    columns = side.projection.shape[1]
    tiles = -(-columns // COLUMNS)
    filled = torch.zeros(int(rows.sum()) * LANES, tiles * COLUMNS)
    filled[place, :columns] = side.projection
    by_lane = filled.view(-1, LANES, tiles * COLUMNS)[:, lane_order(dtype)]
    by_part = by_lane.view(len(by_lane), -1, WIDTH, tiles, COLUMNS).permute(3, 0, 1, 4, 2)
    return _Tables(side.offsets[first].contiguous(), length.contiguous(), by_part.contiguous())
