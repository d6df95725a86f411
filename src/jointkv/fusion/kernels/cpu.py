"""The kernels of pair_sums.c and signatures.c, for pages on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointkv.core.blocks import RESOLUTION, KVPages
from jointkv.core.packed import LANES, PACKED_DTYPES, PackedPages, RowPatterns, lane_order
from jointkv.fusion.kernels import SignatureKernel
from jointkv.system import native

FOLDER = Path(__file__).parent
COLUMNS, WIDTH = 4, 8
"""As in signatures.c."""

RUN = 32 * LANES
"""Elements read of a page before the next page's are: their directions stay in the first-level cache."""


class _RowPatterns(ctypes.Structure):
    """`row_patterns` of pair_sums.c."""

    _fields_ = (
        *((name, c_int64) for name in ("elements", "slots", "patterns")),
        *((name, c_void_p) for name in RowPatterns._fields),
    )


class _BlockSide(ctypes.Structure):
    """`block_side` of signatures.c."""

    _fields_ = (
        ("layers", c_void_p),
        *((name, c_int64) for name in ("page_bytes", "rows", "runs")),
        *((name, c_void_p) for name in ("run_start", "run_length", "projection")),
    )


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

    def signatures(self, kv: KVPages, projections: Sequence[Tensor]) -> SignatureKernel:
        ordered = [_in_order(side.order, part) for side, part in zip(kv.sides, projections, strict=True)]
        by_row = [_by_row(projection, kv.dtype) for _, _, projection in ordered]
        columns, dtype = projections[0].shape[1], PACKED_DTYPES.index(kv.dtype)

        def take(kv: KVPages, pages: Tensor) -> Tensor:
            signatures = torch.empty(len(pages), 2 * kv.num_layers * columns)
            layers = [_addresses(side.layers) for side in kv.sides]
            sides = (_BlockSide * 2)(
                *(
                    _BlockSide(
                        *(ctypes.addressof(addresses), side.layers[0].stride(0) * side.layers[0].itemsize),
                        *(rows.shape[1], len(start), start.data_ptr(), length.data_ptr(), rows.data_ptr()),
                    )
                    for side, addresses, (start, length, _), rows in zip(kv.sides, layers, ordered, by_row, strict=True)
                )
            )
            self._signatures(
                *(sides, kv.num_layers, dtype, pages.data_ptr(), len(pages), columns),
                *(signatures.data_ptr(), torch.get_num_threads()),
            )
            return signatures

        return take


def _addresses(layers: Sequence[Tensor]) -> Any:
    return (c_void_p * len(layers))(*(layer.data_ptr() for layer in layers))


def _in_order(order: Tensor | None, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Start and length of a block's runs, of at most `RUN` elements, and its projection `[rows * LANES, columns]`."""
    order, place = (torch.arange(len(projection)) if order is None else order.cpu()).sort()
    breaks = torch.cat((torch.tensor([0]), (order.diff() != 1).nonzero()[:, 0] + 1, torch.tensor([len(order)])))
    cuts = torch.cat([torch.arange(int(first), int(end), RUN) for first, end in breaks.unfold(0, 2, 1)])
    lengths = cuts.diff(append=torch.tensor([len(order)]))
    filled = lengths + -lengths % LANES
    rows = torch.arange(len(order)) + (filled.cumsum(0) - filled - cuts).repeat_interleave(lengths)
    padded = torch.zeros(int(filled.sum()), projection.shape[1])
    padded[rows] = projection[place]
    return order[cuts].contiguous(), lengths, padded


def _by_row(projection: Tensor, dtype: torch.dtype) -> Tensor:
    """A projection as `block_side` tells it, `[tiles, rows, ...]`."""
    filled = torch.nn.functional.pad(projection, (0, -projection.shape[1] % COLUMNS))
    by_lane = filled.view(-1, LANES, filled.shape[1])[:, lane_order(dtype)]
    return by_lane.view(len(by_lane), LANES // WIDTH, WIDTH, -1, COLUMNS).permute(3, 0, 1, 4, 2).contiguous()
