"""Saved caches: distinct pages, tables and scales in one safetensors file. No code runs when one is read."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as shown
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from jointkv.errors import BadInput, ModelMismatch
from jointkv.policy.base import MOST
from jointkv.system.files import replace_tensors

if TYPE_CHECKING:
    from jointkv.hf.cache import JointCache

FORMAT = "jointkv.cache/1"
LONGEST_COMMON_PADDING = 1 << 20
"""Tokens; the longest row of a batch may be gone while its padding is still there."""


def save_cache(cache: JointCache, path: Path | str) -> None:
    """Write `cache` to `path`; see `JointCache.save`.

    Raises:
        BadInput: the cache is empty, or the file cannot be written.
    """
    if not cache.tables:
        raise BadInput(f"{path}: an empty cache cannot be saved")
    metadata = {"format": FORMAT, "length": str(cache.length), **_layout(cache)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in pack(cache).items()}
    replace_tensors(path, tensors, metadata)


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
            _check_metadata(cache, path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: not a saved cache: {error}") from None
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


def _check_metadata(cache: JointCache, path: Path | str, metadata: dict[str, str]) -> None:
    """Raises BadInput for a file of another kind, ModelMismatch for one of another model or layout."""
    if metadata.get("format") != FORMAT:
        raise BadInput(f"{path}: not a saved cache ({FORMAT})")
    for name, expected in _layout(cache).items():
        if metadata.get(name) != expected:
            raise ModelMismatch(f"{path}: saved with {name} {shown(metadata.get(name))}, this pool has {expected}")


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
    """Raises KeyError or ValueError for what is missing, malformed or contradictory, or names pages outside the file.

    Whatever memory is taken for later is bounded here by what the file holds: a shape without elements, or padding that
    all rows share, costs a file nothing.
    """
    padding = _expect(tensors, "padding", torch.long, None)
    rows = len(padding)
    if not rows or not 0 <= length <= MOST or not 0 <= padding.min() <= padding.max() <= length:
        raise ValueError("padding outside the sequence")
    if padding.min() > LONGEST_COMMON_PADDING:
        raise ValueError(f"{int(padding.min())} tokens of padding in every row")
    _expect(tensors, "fusable", torch.bool, rows)
    pages = _check_pages(cache, tensors)
    needed = -(-(length - padding) // cache.pool.block_size)
    for group in range(cache.pool.groups.count):
        table = _expect(tensors, f"table.{group}", torch.long, rows, None)
        present = torch.arange(table.shape[1]) < needed[:, None]
        if needed.max() > table.shape[1] or ((table >= 0) != present).any() or (table >= pages).any():
            raise ValueError(f"table.{group} names pages that the file lacks")
        _expect(tensors, f"served.{group}", torch.bool, *table.shape)
        names = [name for name in (f"k_scale.{group}", f"v_scale.{group}") if name in tensors]
        scales = [_expect(tensors, name, torch.float32, cache.pool.groups.layers, *table.shape) for name in names]
        if len(scales) == 1 or any(not scale.isfinite().all() for scale in scales):
            raise ValueError(f"the scales of table.{group} are malformed")
    for index, _ in _sliding(cache):
        keys, values = (tensors[f"sliding.{index}.{side}"] for side in ("keys", "values"))
        if keys.dim() != 4 or keys.shape[0] != rows or keys.shape[2] > length or keys.shape[:3] != values.shape[:3]:
            raise ValueError(f"sliding.{index} is {list(keys.shape)} and {list(values.shape)}")
        if keys.dtype != values.dtype or not keys.is_floating_point() or not keys[:, :, :1].numel():
            raise ValueError(f"sliding.{index} is {keys.dtype} and {values.dtype}")
    if "tokens" in tensors:
        _expect(tensors, "tokens", torch.long, rows, length)


def _check_pages(cache: JointCache, tensors: dict[str, Tensor]) -> int:
    """How many pages there are; see `_check`."""
    count = len(_expect(tensors, "key.0", None, None, None, None, None))
    for side in ("key", "value"):
        first = _expect(tensors, f"{side}.0", None, count, cache.pool.block_size, None, None)
        if str(first.dtype) != _layout(cache)["dtype"] or not first.shape[2:].numel():
            raise ValueError(f"{side}.0 is {first.dtype} {list(first.shape)}")
        for index in range(cache.pool.groups.layers):
            _expect(tensors, f"{side}.{index}", first.dtype, *first.shape)
    return count


def _expect(tensors: dict[str, Tensor], name: str, dtype: torch.dtype | None, *shape: int | None) -> Tensor:
    """The tensor `name`. Raises ValueError unless it has `dtype` and `shape`, where None stands for any."""
    tensor = tensors[name]
    agrees = all(wanted in (None, found) for wanted, found in zip(shape, tensor.shape, strict=False))
    if dtype not in (None, tensor.dtype) or tensor.dim() != len(shape) or not agrees:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    return tensor
