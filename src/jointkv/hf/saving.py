"""Saved caches: distinct pages, tables and scales in one safetensors file. No code runs when one is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from jointkv.errors import BadInput, ModelMismatch

if TYPE_CHECKING:
    from jointkv.hf.cache import JointCache

FORMAT = "jointkv.cache/1"


def save_cache(cache: JointCache, path: Path | str) -> None:
    """Write `cache` to `path`; see `JointCache.save`.

    Raises:
        BadInput: the cache is empty, or the file cannot be written.
    """
    if not cache.tables:
        raise BadInput(f"{path}: an empty cache cannot be saved")
    metadata = {"format": FORMAT, "length": str(cache.length), **_layout(cache)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in pack(cache).items()}
    try:
        save_file(tensors, str(path), metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be written: {error}") from None


def pack(cache: JointCache) -> dict[str, Tensor]:
    """Copy what a non-empty cache holds: distinct pages, tables that number them from 0, scales, padding."""
    assert cache.pool.blocks is not None
    kv = cache.pool.blocks.kv
    widths = [table.pages.numel() for table in cache.tables]
    distinct, local = torch.cat([table.pages.flatten() for table in cache.tables]).unique(return_inverse=True)
    offset = int((distinct < 0).sum())  # the marker of empty slots comes first, if there is one
    distinct, local = distinct[offset:].to(kv.device), local - offset
    tensors: dict[str, Tensor] = {"padding": cache.padding, "fusable": cache.fusable}
    for index in range(kv.num_layers):
        tensors[f"key.{index}"], tensors[f"value.{index}"] = (
            kv.keys[index][distinct],
            kv.values[index][distinct],
        )
    for group, (table, pages) in enumerate(zip(cache.tables, local.split(widths), strict=True)):
        tensors[f"table.{group}"] = pages.view_as(table.pages)
        tensors[f"served.{group}"] = table.served
        if table.k_scale is not None and table.v_scale is not None:
            tensors[f"k_scale.{group}"], tensors[f"v_scale.{group}"] = table.k_scale, table.v_scale
    if cache.tokens is not None:
        tensors["tokens"] = cache.tokens
    for index, layer in _sliding(cache):
        tensors[f"sliding.{index}.keys"], tensors[f"sliding.{index}.values"] = layer.keys, layer.values
    return tensors


def load_cache(cache: JointCache, path: Path | str) -> JointCache:
    """Fill the empty `cache` with what `save_cache` wrote; see `JointCache.load`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: not a saved cache: {error}") from None
    if metadata.get("format") != FORMAT:
        raise BadInput(f"{path}: not a saved cache ({FORMAT})")
    for name, expected in _layout(cache).items():
        if metadata.get(name) != expected:
            raise ModelMismatch(f"{path}: saved with {name} {metadata.get(name)}, this pool has {expected}")
    try:
        length = int(metadata["length"])
        _check(cache, tensors, length)
    except (KeyError, ValueError, AttributeError) as error:
        raise BadInput(f"{path}: a damaged cache: {error}") from None
    unpack(cache, length, tensors)
    return cache


def unpack(cache: JointCache, length: int, tensors: dict[str, Tensor]) -> None:
    """Make what `pack` returned, of sequences of `length` tokens, the content of the empty `cache`, and fuse it.

    Raises:
        PoolFull: too few pages are free; the cache stays empty.
    """
    cache.restore(length, tensors)
    for index, layer in _sliding(cache):
        keys, values = tensors[f"sliding.{index}.keys"], tensors[f"sliding.{index}.values"]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, length


def _layout(cache: JointCache) -> dict[str, str]:
    """What must agree between a file and a pool."""
    return {
        "model": cache.pool.fingerprint,
        "block_size": str(cache.pool.block_size),
        "layers_per_group": str(cache.pool.groups.layers),
        "layer_groups": str(cache.pool.groups.count),
        "dtype": str(cache.pool.blocks.kv.keys[0].dtype if cache.pool.blocks else cache.pool.dtype),
    }


def _sliding(cache: JointCache) -> list[tuple[int, DynamicSlidingWindowLayer]]:
    return [(i, layer) for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicSlidingWindowLayer)]


def _check(cache: JointCache, tensors: dict[str, Tensor], length: int) -> None:
    """Raises KeyError or ValueError for missing tensors, or tables that name pages outside the file."""
    pages, size = tensors["key.0"].shape[:2]
    rows = len(tensors["padding"])
    if size != cache.pool.block_size or length < 0 or len(tensors["fusable"]) != rows:
        raise ValueError("sizes do not agree")
    if str(tensors["key.0"].dtype) != _layout(cache)["dtype"]:
        raise ValueError("pages of another dtype than the file says")
    if ((tensors["padding"] < 0) | (tensors["padding"] > length)).any():
        raise ValueError("padding outside the sequence")
    for index in range(cache.pool.groups.layers):
        for side in ("key", "value"):
            if tensors[f"{side}.{index}"].shape != tensors[f"{side}.0"].shape:
                raise ValueError(f"{side}.{index} differs in shape")
            if tensors[f"{side}.{index}"].shape[:3] != tensors["key.0"].shape[:3]:
                raise ValueError(f"{side}.{index} differs in shape")
    needed = -(-(length - tensors["padding"]) // size)
    for group in range(cache.pool.groups.count):
        table = tensors[f"table.{group}"]
        if table.dtype != torch.long or table.dim() != 2 or len(table) != rows:
            raise ValueError(f"table.{group} is malformed")
        present = torch.arange(table.shape[1]) < needed[:, None]
        if needed.max() > table.shape[1] or ((table >= 0) != present).any() or (table >= pages).any():
            raise ValueError(f"table.{group} names pages that the file lacks")
        served = tensors[f"served.{group}"]
        if served.dtype != torch.bool or served.shape != table.shape:
            raise ValueError(f"served.{group} is malformed")
        scales = [tensors[name] for name in (f"k_scale.{group}", f"v_scale.{group}") if name in tensors]
        shape = (cache.pool.groups.layers, *table.shape)
        if len(scales) == 1 or any(scale.shape != shape or not scale.isfinite().all() for scale in scales):
            raise ValueError(f"the scales of table.{group} are malformed")
    for index, _ in _sliding(cache):
        if tensors[f"sliding.{index}.keys"].shape[0] != rows:
            raise ValueError(f"sliding.{index} is malformed")
    if "tokens" in tensors and tensors["tokens"].shape != (rows, length):
        raise ValueError("tokens are malformed")
