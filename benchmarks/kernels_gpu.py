"""The GPU's rows of kernels.py: Triton kernels checked against float64 on fresh random inputs, then timed.

`python benchmarks/kernels.py --device cuda --output docs/results/kernels` on a machine with a GPU. Decode is compared
with the bytes of the pages it must read over the bandwidth of a large copy, prefill with torch's attention over the
same K and V without pages. Both bandwidths are measured here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from jointkv.attention import gpu
from jointkv.attention.grouping import group_pages
from jointkv.attention.layouts import LayerPages
from jointkv.attention.paged import paged_attention
from jointkv.attention.work import WorkList

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3}
CHECKED = 64
CALLS = 10
"""In one sample, so that what the host does for a call is hidden as in a model's layers."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; the default takes minutes and 3 GB of a GPU."""

    decoding: int = 64
    context: int = 4096
    prefilling: int = 2
    sharing: tuple[int, ...] = (1, 4, 16)
    query_heads: int = 32
    heads: int = 8
    size: int = 128
    block_size: int = 16
    copied: int = 2**30


class Layer:
    """A layer's random pages as vLLM keeps them on GPUs, `[2, pages, t, h, d]`."""

    def __init__(self, sizes: Sizes, sequences: int, queries: int, dtype: torch.dtype, device: torch.device) -> None:
        self.sizes, self.sequences, self.queries, self.device = sizes, sequences, queries, device
        self.slots = sizes.context // sizes.block_size
        shape = (2, sequences * self.slots, sizes.block_size, sizes.heads, sizes.size)
        self.pages = LayerPages.of_pool(*torch.randn(shape, dtype=dtype, device=device))
        shape = (sequences * queries, sizes.query_heads, sizes.size)
        self.query = torch.randn(shape, dtype=dtype, device=device)
        self.scales = torch.rand(2, sequences, self.slots, device=device) + 0.5

    def tables(self, sharing: int) -> Tensor:
        """Each page but the last of a sequence serves `sharing` sequences."""
        tables = torch.randperm(self.sequences * self.slots).view(self.sequences, self.slots)
        shared = tables[torch.arange(self.sequences) // sharing * sharing].clone()
        shared[:, -1] = tables[:, -1]
        return shared

    def work(self, tables: Tensor, share: bool) -> WorkList:
        sizes = self.sizes
        return group_pages(
            *(tables, torch.full((self.sequences,), sizes.context), sizes.block_size),
            query_lengths=torch.full((self.sequences,), self.queries),
            heads_per_kv_head=sizes.query_heads // sizes.heads,
            share=share,
            threads=gpu.threads(self.device, sizes.heads) if self.device.type == "cuda" else 1,
        )

    def dense(self, tables: Tensor) -> tuple[Tensor, Tensor]:
        """K and V without pages, `[sequences, h, tokens, d]`."""
        keys, values = (part[tables.to(self.device)].flatten(1, 2).transpose(1, 2) for part in self.pages.read())
        return keys.contiguous(), values.contiguous()

    def check(self, found: Tensor, tables: Tensor, scaled: bool) -> float:
        """The largest relative error of a head, over the last queries of the last sequence."""
        checked, context = min(self.queries, CHECKED), self.sizes.context
        keys, values = (part[tables[-1].to(self.device)].double() for part in self.pages.read())
        if scaled:
            keys, values = (
                part * scale[-1, :, None, None, None] for part, scale in zip((keys, values), self.scales, strict=True)
            )
        group = self.sizes.query_heads // self.sizes.heads
        keys, values = (part.flatten(0, 1).transpose(0, 1).repeat_interleave(group, 0) for part in (keys, values))
        query = self.query[-checked:].double().transpose(0, 1)
        future = torch.ones(checked, context, device=self.device).triu(context - checked + 1)
        logits = (query @ keys.mT * self.sizes.size**-0.5).masked_fill(future.bool(), -torch.inf)
        truth = (logits.softmax(-1) @ values).transpose(0, 1)
        apart = torch.linalg.vector_norm(found[-checked:].double() - truth, dim=-1)
        worst = float((apart / torch.linalg.vector_norm(truth, dim=-1)).max())
        if not worst < TOLERANCE[found.dtype]:
            raise SystemExit(f"attention on {self.device} is off by {worst}")
        return worst


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Of one call each; the first sample is not counted."""
    taken = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - start) / CALLS)
    return taken[1:]


def copy_bandwidth(size: int, device: torch.device, repeats: int) -> float:
    """Bytes read and written per second by a copy of `size` bytes."""
    large = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(large)
    return 2 * size / min(seconds(lambda: target.copy_(large), device, repeats))


def decode(layer: Layer, sharing: int, bandwidth: float, repeats: int) -> dict[str, Any]:
    tables = layer.tables(sharing)
    page = sum(part[0].numel() * part.itemsize for part in layer.pages.read())
    errors, samples, fractions = {}, {}, {}
    for name, share, scaled in (("alone", False, False), ("alone_scaled", False, True), ("shared", True, False)):
        work = layer.work(tables, share)
        key, value = layer.scales if scaled else (None, None)

        def attend(work: WorkList = work, key: Tensor | None = key, value: Tensor | None = value) -> Tensor:
            return paged_attention(layer.query, layer.pages, work, k_scale=key, v_scale=value, kernel=gpu.attend)[0]

        errors[name] = layer.check(attend(), tables, scaled)
        samples[name] = seconds(attend, layer.device, repeats)
        moved = page * (len(tables.unique()) if share else tables.numel())
        fractions[name] = moved / bandwidth / median(samples[name])
    return {
        "sequences_per_page": sharing,
        "relative_error": errors,
        "seconds": samples,
        "fraction_of_copy_bandwidth": fractions,
        "alone_over_shared": median(samples["alone"]) / median(samples["shared"]),
    }


def prefill(layer: Layer, repeats: int) -> dict[str, Any]:
    tables = layer.tables(1)
    work, (keys, values) = layer.work(tables, True), layer.dense(tables)
    query = layer.query.view(layer.sequences, layer.queries, *layer.query.shape[1:]).transpose(1, 2).contiguous()

    def attend() -> Tensor:
        return paged_attention(layer.query, layer.pages, work, kernel=gpu.attend)[0]

    def stock() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)

    error = layer.check(attend(), tables, False)
    samples = {"ours": seconds(attend, layer.device, repeats), "torch": seconds(stock, layer.device, repeats)}
    over = median(samples["ours"]) / median(samples["torch"])
    return {"queries": layer.queries, "relative_error": error, "seconds": samples, "over_torch": over}


def measure(device: torch.device, repeats: int, sizes: Sizes | None = None) -> dict[str, Any]:
    """Rows of decode and of prefill in both dtypes, and the worst of each goal."""
    sizes = sizes or Sizes()
    bandwidth = copy_bandwidth(sizes.copied, device, repeats)
    decoded, prefilled = [], []
    for dtype in TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        layer = Layer(sizes, sizes.decoding, 1, dtype, device)
        decoded += [{"dtype": name, **decode(layer, sharing, bandwidth, repeats)} for sharing in sizes.sharing]
        layer = Layer(sizes, sizes.prefilling, sizes.context, dtype, device)
        prefilled.append({"dtype": name, **prefill(layer, repeats)})
    single, four = ([row for row in decoded if row["sequences_per_page"] == n] for n in (1, 4))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "copy_bytes_per_s": bandwidth,
        "headline": {
            "norm_aware_fraction_of_copy": min(row["fraction_of_copy_bandwidth"]["alone_scaled"] for row in single),
            "alone_over_shared_at_four": min(row["alone_over_shared"] for row in four),
            "prefill_over_torch": max(row["over_torch"] for row in prefilled),
        },
        "sizes": vars(sizes),
        "decode": decoded,
        "prefill": prefilled,
    }
