"""The kernels of pair_sums.c and signatures.c, for pages on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointkv.core.blocks import RESOLUTION, PagedKV
from jointkv.core.packed import LANES, PACKED_DTYPES, PackedPages, RowPatterns, lane_order
from jointkv.fusion.kernels import SignatureKernel
from jointkv.system import native

FOLDER = Path(__file__).parent
COLUMNS, WIDTH = 4, 8
"""As in signatures.c."""


class _RowPatterns(ctypes.Structure):
    """`row_patterns` of pair_sums.c."""

    _fields_ = (
        *((name, c_int64) for name in ("elements", "slots", "patterns")),
        *((name, c_void_p) for name in RowPatterns._fields),
    )


class _BlockSide(ctypes.Structure):
    """`block_side` of signatures.c."""

    _fields_ = (("layers", c_void_p), ("elements", c_int64), ("projection", c_void_p))


class Kernels:
    """See `jointkv.fusion.kernels.Kernels`."""

    def __init__(self) -> None:
        self._pair_sums = native.load(FOLDER / "pair_sums.c").jointkv_pair_sums
        self._pair_sums.argtypes = [
            *(POINTER(_RowPatterns), c_void_p, c_int64, c_int64, c_int32),
            *(c_void_p, c_void_p, c_int64, c_float, c_void_p, c_int32),
        ]
        self._signatures = native.load(FOLDER / "signatures.c").jointkv_signatures
        self._signatures.argtypes = [
            *(POINTER(_BlockSide), c_int64, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_int32)
        ]
        self._pair_sums.restype = self._signatures.restype = None

    def pair_sums(self, pages: PackedPages, own: Tensor, other: Tensor) -> Tensor:
        first, patterns = pages.layers[0], pages.row_patterns
        sums = torch.empty(len(own), pages.num_layers, 2, pages.block_size, 3)
        rows = _RowPatterns(
            *(first.shape[1], 2 * pages.block_size, len(patterns.fold)), *(table.data_ptr() for table in patterns)
        )
        self._pair_sums(
            *(rows, _addresses(pages.layers), pages.num_layers, first.stride(0) * first.itemsize),
            *(PACKED_DTYPES.index(first.dtype), own.data_ptr(), other.data_ptr(), len(own), RESOLUTION),
            *(sums.data_ptr(), torch.get_num_threads()),
        )
        return sums

    def signatures(self, dtype: torch.dtype, projections: Sequence[Tensor]) -> SignatureKernel:
        by_row = [_by_row(projection, dtype) for projection in projections]
        columns = projections[0].shape[1]

        def take(kv: PagedKV, pages: Tensor) -> Tensor:
            signatures = torch.empty(len(pages), 2 * kv.num_layers * columns)
            layers = [_addresses(side) for side in (kv.keys, kv.values)]
            sides = (_BlockSide * 2)(
                *(
                    _BlockSide(ctypes.addressof(addresses), len(projection), rows.data_ptr())
                    for addresses, projection, rows in zip(layers, projections, by_row, strict=True)
                )
            )
            self._signatures(
                *(sides, kv.num_layers, PACKED_DTYPES.index(dtype), pages.data_ptr(), len(pages), columns),
                *(signatures.data_ptr(), torch.get_num_threads()),
            )
            return signatures

        return take


def _addresses(layers: Sequence[Tensor]) -> Any:
    return (c_void_p * len(layers))(*(layer.data_ptr() for layer in layers))


def _by_row(projection: Tensor, dtype: torch.dtype) -> Tensor:
    """A projection `[r, columns]` as `block_side` tells it."""
    size, columns = projection.shape
    filled = torch.nn.functional.pad(projection, (0, -columns % COLUMNS, 0, -size % LANES))
    by_lane = filled.view(-1, LANES, filled.shape[1])[:, lane_order(dtype)]
    return by_lane.view(len(by_lane), LANES // WIDTH, WIDTH, -1, COLUMNS).permute(3, 0, 1, 4, 2).contiguous()
