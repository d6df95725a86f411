"""Saved caches: distinct pages, tables and scales in one safetensors file. No code runs when one is read."""

from __future__ import annotations

import enum
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jointkv.core.table import BlockTable
from jointkv.errors import BadInput, ModelMismatch
from jointkv.policy.base import MOST
from jointkv.system.files import replace_tensors

FORMAT = "jointkv.cache/1"
KEYS = "isolation_keys"
LONGEST_COMMON_PADDING = 1 << 20
"""Tokens; the longest row of a batch may be gone while its padding is still there."""


class FromFile(enum.Enum):
    """In place of an isolation key: that of the file."""

    KEY = "the key that was saved"


State = dict[str, Tensor]
"""What a cache holds, by name: pages `key.LAYER` and `value.LAYER` of the layers of a group, `table.GROUP` with flags
and scales; `padding`, `fusable` and maybe `tokens` of the rows; `sliding.LAYER.keys` and `.values` of other layers."""


@dataclass(frozen=True)
class Layout:
    """What must agree between a file and the pool it is read into; `sliding` are the layers that keep a window."""

    model: str
    block_size: int
    layers_per_group: int
    layer_groups: int
    dtype: str
    sliding: tuple[int, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """As a file names it."""
        return {name: str(value) for name, value in vars(self).items() if name != "sliding"}


def write(path: Path | str, layout: Layout, tenants: Sequence[Hashable], length: int, state: State) -> None:
    """Write `state` of rows of `length` tokens to `path`, with the isolation key of each row.

    Raises:
        BadInput: it cannot be written, or a key is not made of text, numbers, None, and tuples of them.
    """
    keys = json.dumps([_plain(key) for key in tenants])
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    replace_tensors(path, tensors, {"format": FORMAT, "length": str(length), KEYS: keys, **layout.metadata})


def read(path: Path | str, layout: Layout) -> tuple[list[Hashable] | None, int, State]:
    """Isolation keys, length and state of what `write` wrote, made sure of; no keys: the file is of an older release.

    Raises:
        BadInput: no saved cache, or a damaged one.
        ModelMismatch: of another model or layout.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise BadInput(f"{path}: not a saved cache ({FORMAT})")
            for name, expected in layout.metadata.items():
                if (found := metadata.get(name)) != expected:
                    raise ModelMismatch(f"{path}: saved with {name} {shown(found)}, this pool has {expected}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: not a saved cache: {error}") from None
    try:
        length = int(metadata["length"])
        _check(layout, state, length)
        keys = _keys(metadata[KEYS], len(state["padding"])) if KEYS in metadata else None
    except (KeyError, ValueError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: a damaged cache: {error}") from None
    return keys, length, state


def _plain(key: Hashable) -> Any:
    """`key` as JSON has it."""
    if isinstance(key, tuple):
        return [_plain(part) for part in key]
    if key is None or isinstance(key, (str, int)):
        return key
    raise BadInput(
        f"the isolation key {shown(key)} cannot be saved: use text, whole numbers or tuples of them, such as str(key)"
    )


def _keys(text: str, rows: int) -> list[Hashable]:
    keys = json.loads(text)
    if not isinstance(keys, list) or len(keys) != rows:
        raise ValueError(f"isolation keys of {rows} rows")
    return [_hashable(key) for key in keys]


def _hashable(key: Any) -> Hashable:
    if isinstance(key, list):
        return tuple(_hashable(part) for part in key)
    if key is None or isinstance(key, (str, int)):
        return key
    raise ValueError("isolation keys")


def pack(tables: Sequence[BlockTable]) -> State:
    """Copy the distinct pages of a cache, and the tables of its layer groups, which number them from 0, with scales.

    What the cache holds later changes nothing of it.
    """
    kv = tables[0].pool.kv
    widths = [table.pages.numel() for table in tables]
    distinct, local = torch.cat([table.pages.flatten() for table in tables]).unique(return_inverse=True)
    offset = int((distinct < 0).sum())  # the marker of empty slots comes first, if there is one
    distinct, local = distinct[offset:].to(kv.device), local - offset
    state = {}
    for index in range(kv.num_layers):
        state[f"key.{index}"], state[f"value.{index}"] = kv.keys[index][distinct], kv.values[index][distinct]
    for group, (table, pages) in enumerate(zip(tables, local.split(widths), strict=True)):
        state[f"table.{group}"], state[f"served.{group}"] = pages.view_as(table.pages), table.served.clone()
        if table.k_scale is not None and table.v_scale is not None:
            state[f"k_scale.{group}"], state[f"v_scale.{group}"] = table.k_scale.clone(), table.v_scale.clone()
    return state


def unpack(tables: Sequence[BlockTable], state: State) -> None:
    """Fill empty `tables` of one pool with what `pack` returned, on pages of their own.

    Raises:
        PoolFull: too few pages are free; nothing was changed.
    """
    pool = tables[0].pool
    pages = pool.allocate(len(state["key.0"]))
    for index in range(pool.kv.num_layers):
        pool.kv.keys[index][pages] = state[f"key.{index}"].to(pool.kv.device)
        pool.kv.values[index][pages] = state[f"value.{index}"].to(pool.kv.device)
    for group, table in enumerate(tables):
        local = state[f"table.{group}"]
        adopted = local.clone()
        adopted[local >= 0] = pages[local[local >= 0]]
        table.adopt(adopted, state[f"served.{group}"], *(state.get(f"{side}_scale.{group}") for side in "kv"))
    pool.free(pages)


def _check(layout: Layout, state: State, length: int) -> None:
    """Raises KeyError or ValueError for what is missing, malformed or contradictory, or names pages outside the file.

    Whatever memory is taken for later is bounded here by what the file holds: a shape without elements, or padding that
    all rows share, costs a file nothing.
    """
    padding = _expect(state, "padding", torch.long, None)
    rows = len(padding)
    if not rows or not 0 <= length <= MOST or not 0 <= padding.min() <= padding.max() <= length:
        raise ValueError("padding outside the sequence")
    if padding.min() > LONGEST_COMMON_PADDING:
        raise ValueError(f"{int(padding.min())} tokens of padding in every row")
    _expect(state, "fusable", torch.bool, rows)
    pages = _check_pages(layout, state)
    needed = -(-(length - padding) // layout.block_size)
    for group in range(layout.layer_groups):
        table = _expect(state, f"table.{group}", torch.long, rows, None)
        present = torch.arange(table.shape[1]) < needed[:, None]
        if needed.max() > table.shape[1] or ((table >= 0) != present).any() or (table >= pages).any():
            raise ValueError(f"table.{group} names pages that the file lacks")
        _expect(state, f"served.{group}", torch.bool, *table.shape)
        names = [name for name in (f"k_scale.{group}", f"v_scale.{group}") if name in state]
        scales = [_expect(state, name, torch.float32, layout.layers_per_group, *table.shape) for name in names]
        if len(scales) == 1 or any(not scale.isfinite().all() for scale in scales):
            raise ValueError(f"the scales of table.{group} are malformed")
    for index in layout.sliding:
        keys, values = (state[f"sliding.{index}.{side}"] for side in ("keys", "values"))
        if keys.dim() != 4 or keys.shape[0] != rows or keys.shape[2] > length or keys.shape[:3] != values.shape[:3]:
            raise ValueError(f"sliding.{index} is {list(keys.shape)} and {list(values.shape)}")
        if keys.dtype != values.dtype or not keys.is_floating_point() or not keys[:, :, :1].numel():
            raise ValueError(f"sliding.{index} is {keys.dtype} and {values.dtype}")
    if "tokens" in state:
        _expect(state, "tokens", torch.long, rows, length)


def _check_pages(layout: Layout, state: State) -> int:
    """How many pages there are; see `_check`."""
    count = len(_expect(state, "key.0", None, None, None, None, None))
    for side in ("key", "value"):
        first = _expect(state, f"{side}.0", None, count, layout.block_size, None, None)
        if str(first.dtype) != layout.dtype or not first.shape[2:].numel():
            raise ValueError(f"{side}.0 is {first.dtype} {list(first.shape)}")
        for index in range(layout.layers_per_group):
            _expect(state, f"{side}.{index}", first.dtype, *first.shape)
    return count


def _expect(state: State, name: str, dtype: torch.dtype | None, *shape: int | None) -> Tensor:
    """The tensor `name`. Raises ValueError unless it has `dtype` and `shape`, where None stands for any."""
    tensor = state[name]
    agrees = all(wanted in (None, found) for wanted, found in zip(shape, tensor.shape, strict=False))
    if dtype not in (None, tensor.dtype) or tensor.dim() != len(shape) or not agrees:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    return tensor
