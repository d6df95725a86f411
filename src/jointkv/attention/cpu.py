"""Paged attention on the CPU by a compiled kernel that reads a page once for all sequences that share it."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointkv.attention import reference
from jointkv.attention.checks import check, check_scale, with_turned
from jointkv.attention.layouts import PAGE_DTYPES, LayerPages
from jointkv.attention.reference import Turn
from jointkv.attention.work import NativeWork, WorkList
from jointkv.core.plan import BlockRef
from jointkv.errors import LayoutError, NativeUnavailable
from jointkv.system import native

SOURCE = Path(__file__).with_name("paged.c")

ORDERS = ("rows", "columns", "pairs")


def paged_attention(
    query: Tensor,
    pages: LayerPages,
    work: WorkList,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    turn: Turn | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of a ragged batch over pages; what `reference.paged_attention` defines.

    Computed in float32. Without a C compiler the reference does it, which is said once.

    Args:
        query: `[work.num_queries, h * work.heads_per_kv_head, d]`, float32, bfloat16 or float16.
        pages: of one layer.
        work: from `group_pages`, for the block tables as they stand.
        k_scale, v_scale: factors on the K and V that each sequence reads, `[rows, slots]` like the block tables, all
            positive and finite; None for 1.
        scale: factor on the logits; `d ** -0.5` when None.
        turn: `turn(query, -shift)`; needed when a shift is not 0.

    Returns:
        Output `[work.num_queries, query heads, dv]` in the query's dtype, and the log-sum-exp of the scaled logits,
        float32 `[work.num_queries, query heads]`.

    Raises:
        LayoutError: shapes, dtypes or scales that do not fit, or a shift without `turn`.
    """
    if pages.device.type != "cpu":
        raise LayoutError(f"pages of {pages.dtype} on {pages.device} are not supported")
    check(query, pages, work, turn)
    scales = _checked_scales(work, k_scale, v_scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    kernel = _kernel()
    if kernel is None:
        return _by_reference(query, pages, work, *scales, scale=scale, turn=turn)
    rows = with_turned(query.float(), work, turn).contiguous()
    heads, size = query.shape[1], pages.value_size
    output = torch.empty(len(query), heads, size)
    log_sum = torch.empty(len(query), heads)
    partials = len(work.merge.partial)
    scratch = torch.empty(partials * heads * (size + 2))
    done = kernel(
        *(_store(pages, heads), work.native, rows.data_ptr(), scale),
        *(None if table is None else table.data_ptr() for table in scales),
        *(scratch.data_ptr(), partials, output.data_ptr(), log_sum.data_ptr(), torch.get_num_threads()),
    )
    if done != 0:
        raise MemoryError("no memory for the attention kernel")
    return output.to(query.dtype), log_sum


def _checked_scales(
    work: WorkList, k_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Both tables, as the kernel reads them, or none."""
    if k_scale is None and v_scale is None:
        return None, None
    tables = [torch.ones(work.shape) if table is None else table for table in (k_scale, v_scale)]
    for table in tables:
        check_scale(table, work)
    key, value = (table.to("cpu", torch.float32).contiguous() for table in tables)
    return key, value


class _Store(ctypes.Structure):
    """`page_store` of pages.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((f"{side}_{of}", ctypes.c_int64) for side in ("key", "value") for of in ("page", "head", "line")),
        *((name, ctypes.c_int64) for name in ("tokens", "key_size", "value_size", "heads", "group")),
        *((name, ctypes.c_int32) for name in ("dtype", "order")),
    )


def _store(pages: LayerPages, query_heads: int) -> _Store:
    """Lines are tokens of K by rows, coordinates of K by columns, and tokens of V."""
    keys, values, heads = pages.keys, pages.values, pages.num_heads
    head, key_line, value_line = {"rows": (2, 1, 1), "columns": (2, 3, 1), "pairs": (1, 4, 4)}[pages.order]
    strides = [
        *(keys.stride(axis) for axis in (0, head, key_line)),
        *(values.stride(axis) for axis in (0, head, value_line)),
    ]
    sizes = (pages.block_size, pages.key_size, pages.value_size, heads, query_heads // heads)
    return _Store(
        *(keys.data_ptr(), values.data_ptr(), *(stride * keys.itemsize for stride in strides), *sizes),
        *(PAGE_DTYPES.index(pages.dtype), ORDERS.index(pages.order)),
    )


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    """The compiled kernel; None, said once, where there is none."""
    try:
        kernel = native.load(SOURCE).jointkv_paged_attention
    except NativeUnavailable as error:
        warnings.warn(
            "attention over KV pages is very slow without a C compiler: "
            f"install gcc or clang, or name one in CC ({error})",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    address, number = ctypes.c_void_p, ctypes.c_int64
    kernel.argtypes = [
        *(ctypes.POINTER(_Store), ctypes.POINTER(NativeWork), address, ctypes.c_float, address, address),
        *(address, number, address, address, ctypes.c_int32),
    ]
    kernel.restype = ctypes.c_int32
    return kernel


def _by_reference(
    query: Tensor,
    pages: LayerPages,
    work: WorkList,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *,
    scale: float,
    turn: Turn | None,
) -> tuple[Tensor, Tensor]:
    tables: list[dict[int, BlockRef]] = [{} for _ in work.lengths]
    for row, slot, ref in work.references():
        key, value = (1.0 if table is None else float(table[row, slot]) for table in (k_scale, v_scale))
        tables[row][slot] = dataclasses.replace(ref, k_scale=key, v_scale=value)
    ordered = [[table[slot] for slot in sorted(table)] for table in tables]
    return reference.paged_attention(query, work.query_lengths.tolist(), *pages.read(), ordered, scale=scale, turn=turn)
