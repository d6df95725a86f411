"""Where in its page each number of a K block and of a V block lies."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jointkv.core.blocks import PagedKV
from jointkv.core.packed import PackedPages
from jointkv.errors import LayoutError

ReadablePages = PagedKV | PackedPages


class Side(NamedTuple):
    """The K, or the V, of a block by address.

    Attributes:
        offsets: where its `r` numbers lie, in elements from the first one of the page, ascending; long on the CPU.
        projection: what the number at each of them is multiplied with, float32 `[r, columns]`.
    """

    offsets: Tensor
    projection: Tensor


def sides_of(kv: ReadablePages, projections: Sequence[Tensor]) -> list[Side]:
    """K and V of blocks in pages laid out like those of `kv`.

    Args:
        projections: for K and for V, `[r, columns]`, numbers as `KVPages.vectors` orders them.

    Raises:
        LayoutError: K or V have another size than their projection.
    """
    if isinstance(kv, PackedPages):
        offsets = [side.cpu() for side in kv.order]
    else:
        offsets = [_strided(layers[0]) for layers in (kv.keys, kv.values)]
    sizes = [len(side) for side in offsets]
    if sizes != [len(projection) for projection in projections]:
        raise LayoutError(f"blocks of {sizes} numbers, and projections of {[len(part) for part in projections]}")
    orders = [side.argsort() for side in offsets]
    return [
        Side(side[order], projection[order.to(projection.device)])
        for side, order, projection in zip(offsets, orders, projections, strict=True)
    ]


def layers_of(kv: ReadablePages) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Tensors per layer, pages first, that hold K and those that hold V."""
    return (kv.layers, kv.layers) if isinstance(kv, PackedPages) else (kv.keys, kv.values)


def layout_of(kv: ReadablePages) -> Hashable:
    """Equal for pages that `sides_of` describes alike."""
    if isinstance(kv, PackedPages):
        return kv.dtype, kv.device, kv.layout
    return kv.dtype, kv.device, *((layers[0].shape[1:], layers[0].stride()[1:]) for layers in (kv.keys, kv.values))


def is_uniform(kv: ReadablePages) -> bool:
    """Whether all layers of a side have the same strides, and all of both are on one device."""
    sides = layers_of(kv)
    strided = all(len({layer.stride() for layer in layers}) == 1 for layers in sides)
    return strided and len({layer.device for layers in sides for layer in layers}) == 1


def _strided(layer: Tensor) -> Tensor:
    offsets = torch.zeros(1, dtype=torch.long)
    for size, stride in zip(layer.shape[1:], layer.stride()[1:], strict=True):
        offsets = (offsets[:, None] + torch.arange(size) * stride).flatten()
    return offsets
