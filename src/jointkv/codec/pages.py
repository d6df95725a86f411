"""A batch of pages on their way: K and V of `n` blocks of all layers of a group, and where their text begins."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jointkv.core.blocks import SUPPORTED_DTYPES, PagedKV, aggregate_errors, squared_errors
from jointkv.errors import LayoutError
from jointkv.system.values import check_whole


@dataclass(frozen=True)
class Layout:
    """What a page is made of, apart from its numbers.

    Attributes:
        layers: of the layer group.
        block_size: tokens per page.
        heads: KV heads.
        key_size, value_size: numbers per head and token.
        dtype: of the numbers.

    Raises:
        LayoutError: sizes that are no whole numbers, or another dtype than pages have.
    """

    layers: int
    block_size: int
    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if name != "dtype":
                check_whole(name, size, 0, LayoutError)
        if self.dtype not in SUPPORTED_DTYPES:
            raise LayoutError(f"pages of {self.dtype!r} are not supported; give a dtype of torch")

    @property
    def key_numbers(self) -> int:
        """Numbers of K in a page."""
        return self.layers * self.block_size * self.heads * self.key_size

    @property
    def value_numbers(self) -> int:
        """Numbers of V in a page."""
        return self.layers * self.block_size * self.heads * self.value_size

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page: K and V of all layers."""
        return (self.key_numbers + self.value_numbers) * self.dtype.itemsize

    @property
    def fingerprint(self) -> str:
        """Equal for equal layouts."""
        return hashlib.sha256(repr(tuple(str(value) for value in vars(self).values())).encode()).hexdigest()[:16]


class Errors(NamedTuple):
    """Relative errors of `n` pages, root mean square over their layers, float32 `[n]`; `token` of the worst token."""

    key: Tensor
    value: Tensor
    token: Tensor


@dataclass(frozen=True, eq=False)
class Pages:
    """K and V of `n` pages.

    Attributes:
        keys, values: `[layers, n, t, h, d]` on the CPU; V may have its own `d`.
        positions: of the first token of each page, long `[n]`.

    Raises:
        LayoutError: shapes or dtypes that do not belong together, or are not supported.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    def __post_init__(self) -> None:
        if not all(isinstance(given, Tensor) for given in vars(self).values()):
            raise LayoutError("pages are made of tensors")
        if self.keys.dim() != 5 or self.values.dim() != 5 or self.keys.shape[:4] != self.values.shape[:4]:
            raise LayoutError(f"pages of K {list(self.keys.shape)} and V {list(self.values.shape)}")
        if self.keys.dtype not in SUPPORTED_DTYPES or self.values.dtype != self.keys.dtype:
            raise LayoutError(f"pages of {self.keys.dtype} and {self.values.dtype} are not supported")
        if self.positions.shape != self.keys.shape[1:2] or self.positions.dtype != torch.long:
            raise LayoutError(f"{len(self)} pages with positions {list(self.positions.shape)}")

    def __len__(self) -> int:
        return self.keys.shape[1]

    @property
    def layout(self) -> Layout:
        layers, _, block_size, heads, key_size = self.keys.shape
        return Layout(layers, block_size, heads, key_size, self.values.shape[4], self.keys.dtype)

    @classmethod
    def of(cls, kv: PagedKV, index: Tensor, positions: Tensor) -> Pages:
        """Copies of the pages `index [n]` of `kv`, whose text begins at `positions [n]`."""
        place = index.to(kv.device)
        keys, values = (
            torch.stack([layer.index_select(0, place) for layer in side]).cpu() for side in (kv.keys, kv.values)
        )
        return cls(keys, values, positions.to("cpu", torch.long))

    def take(self, selected: Tensor | slice) -> Pages:
        """The pages that the index, mask or slice `selected` picks; of a slice they are no copies."""
        return Pages(self.keys[:, selected], self.values[:, selected], self.positions[selected])

    @property
    def content(self) -> Tensor:
        """The bytes of each page, uint8 `[n, page_nbytes]`: all of K, then all of V."""
        sides = (side.transpose(0, 1).contiguous().view(torch.uint8) for side in (self.keys, self.values))
        return torch.cat([side.flatten(1) for side in sides], 1)

    @classmethod
    def from_content(cls, content: Tensor, layout: Layout, positions: Tensor) -> Pages:
        """What has the bytes `content`, uint8 `[n, page_nbytes]`."""
        n, split = len(content), layout.key_numbers * layout.dtype.itemsize

        def side(data: Tensor, size: int) -> Tensor:
            shape = (n, layout.layers, layout.block_size, layout.heads, size)
            return data.contiguous().view(layout.dtype).view(shape).transpose(0, 1)

        return cls(side(content[:, :split], layout.key_size), side(content[:, split:], layout.value_size), positions)

    @classmethod
    def empty(cls, layout: Layout, positions: Tensor) -> Pages:
        """Pages to be filled; until then they hold anything."""
        shape = (layout.layers, len(positions), layout.block_size, layout.heads)
        keys, values = (torch.empty(*shape, size, dtype=layout.dtype) for size in (layout.key_size, layout.value_size))
        return cls(keys, values, positions)

    @classmethod
    def joined(cls, parts: Sequence[Pages]) -> Pages:
        """All of `parts`, at least one, in a row."""
        return cls(
            torch.cat([part.keys for part in parts], 1),
            torch.cat([part.values for part in parts], 1),
            torch.cat([part.positions for part in parts]),
        )

    def put(self, selected: Sequence[int], pages: Pages) -> None:
        """Write `pages` over those `selected`."""
        index = torch.tensor(selected, dtype=torch.long)
        self.keys[:, index], self.values[:, index] = pages.keys, pages.values

    def errors(self, decoded: Pages) -> Errors:
        """How far `decoded` is from these pages; NaN and infinities where either has such numbers."""
        parts = []
        for own, read in ((self.keys, decoded.keys), (self.values, decoded.values)):
            # Layer by layer, which stays in the processor's cache. A copy of what is written over.
            pairs = [
                squared_errors(one.flatten(1).float(), two.flatten(1).to(torch.float32, copy=True), own.shape[2])
                for one, two in zip(own, read, strict=True)
            ]
            difference, norm = (torch.stack(side) for side in zip(*pairs, strict=True))
            parts.append(aggregate_errors(difference, norm, "rms"))
        (key, key_token), (value, value_token) = parts
        return Errors(key, value, torch.maximum(key_token, value_token))
