"""Paged attention on the CPU by a compiled kernel that reads a page once for all sequences that share it."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointkv.attention.checks import Attention
from jointkv.attention.layouts import PAGE_DTYPES, LayerPages
from jointkv.attention.work import NativeWork
from jointkv.errors import NativeUnavailable
from jointkv.system import native

SOURCE = Path(__file__).with_name("paged.c")

ORDERS = ("rows", "columns", "pairs")


def attend(asked: Attention) -> tuple[Tensor, Tensor]:
    """See `paged.paged_attention`; computed in float32."""
    query, pages, work, scales, scale, turn = asked
    tables = [table.to("cpu", torch.float32).contiguous() for table in scales or ()]
    rows = work.with_turned(query.float(), turn).contiguous()
    heads, size = query.shape[1], pages.value_size
    output = torch.empty(len(query), heads, size)
    log_sum = torch.empty(len(query), heads)
    partials = len(work.merge.partial)
    scratch = torch.empty(partials * heads * (size + 2))
    kernel = compiled()
    assert kernel is not None
    done = kernel(
        *(_store(pages, heads), work.native, rows.data_ptr(), scale),
        *([table.data_ptr() for table in tables] or (None, None)),
        *(scratch.data_ptr(), partials, output.data_ptr(), log_sum.data_ptr(), torch.get_num_threads()),
    )
    if done != 0:
        raise MemoryError("no memory for the attention kernel")
    return output.to(query.dtype), log_sum


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
def compiled() -> Callable[..., Any] | None:
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
