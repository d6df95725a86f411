"""Attention over KV pages that reads a page once for all sequences that share it, by the kernel for their device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jointkv.attention import cpu, gpu, reference
from jointkv.attention.checks import Attention, check
from jointkv.attention.layouts import LayerPages
from jointkv.attention.work import Turn, WorkList
from jointkv.errors import LayoutError

Kernel = Callable[[Attention], tuple[Tensor, Tensor]]
"""Does what `check` has passed; refuses what only it was not written for."""


def kernel_for(device: torch.device) -> Kernel:
    """The kernel for pages on `device`; plain torch, which is said once, on a CPU without a C compiler.

    Raises:
        LayoutError: there is none.
    """
    if device.type == "cpu":
        return cpu.attend if cpu.compiled() else reference.attend
    if device.type == "cuda":
        return gpu.attend
    raise LayoutError(f"pages on {device} are not supported")


def paged_attention(
    query: Tensor,
    pages: LayerPages,
    work: WorkList,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    turn: Turn | None = None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of a ragged batch over pages; what `reference.paged_attention` defines.

    Args:
        query: `[work.num_queries, h * work.heads_per_kv_head, d]`, float32, bfloat16 or float16, on the pages' device;
            on a GPU of the pages' dtype.
        pages: of one layer; on a GPU by rows.
        work: from `group_pages`, for the block tables as they stand. Copies of it on a GPU are kept with it.
        k_scale, v_scale: factors on the K and V that each sequence reads, `[rows, slots]` like the block tables, all
            positive and finite; None for 1. A table on a GPU is waited for when it is first seen or has changed.
        scale: factor on the logits; `d ** -0.5` when None.
        turn: see `Turn`; needed when a shift is not 0.
        kernel: the one for the pages' device when None.

    Returns:
        Output `[work.num_queries, query heads, dv]` in the query's dtype, and the log-sum-exp of the scaled logits,
        float32 `[work.num_queries, query heads]`. Computed in float32; on a GPU products are taken in the pages' dtype
        and summed in float32.

    Raises:
        LayoutError: shapes, dtypes, devices or scales that do not fit, or a shift without `turn`.
        NativeUnavailable: on a GPU, Triton is not installed.
    """
    kernel = kernel or kernel_for(pages.device)
    scales = None
    if k_scale is not None or v_scale is not None:
        ones = torch.ones(work.shape)
        scales = ones if k_scale is None else k_scale, ones if v_scale is None else v_scale
    asked = Attention(query, pages, work, scales, query.shape[-1] ** -0.5 if scale is None else scale, turn)
    check(asked)
    return kernel(asked)
