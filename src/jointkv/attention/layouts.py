"""Where K and V lie in the pages of a layer, in the orders that were seen; others are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from jointkv.errors import LayoutError

Order = Literal["rows", "columns", "pairs"]

PAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MOST_TOKENS, MOST_SIZE, PAIRS = 256, 512, 16
"""Limits of pages.h."""

ENGINE_ORDERS: dict[str, Order] = {"vec": "columns", "vec16": "columns", "amx": "pairs"}
"""vLLM's names for what its CPU attention is written for, and how it then keeps pages (csrc/cpu/cpu_attn_*.hpp)."""


@dataclass(frozen=True)
class LayerPages:
    """K and V of one layer. Holds references to the tensors, owns nothing else.

    Attributes:
        keys, values: views of the pages; `[pages, t, h, d]` by rows and columns, which differ in the strides of `keys`;
            by pairs `[pages, h, t / 16, d / 2, 16, 2]` and `[pages, h, dv / 16, t / 2, 16, 2]`.
        order: how K lies: the numbers of a token together (`rows`), the tokens of a coordinate (`columns`), or pairs of
            coordinates of 16 tokens (`pairs`; then V as pairs of tokens).

    Raises:
        LayoutError: a dtype, size, alignment or order that the kernels were not written for.
    """

    keys: Tensor
    values: Tensor
    order: Order

    def __post_init__(self) -> None:
        keys, values = self.keys, self.values
        if keys.dtype not in PAGE_DTYPES or values.dtype != keys.dtype or values.device != keys.device:
            raise LayoutError(f"pages of {keys.dtype} and {values.dtype} on {keys.device} are not supported")
        if self.order != "rows" and keys.device.type != "cpu":
            raise LayoutError(f"pages by {self.order} on {keys.device} were never seen")
        if self.order == "pairs" and keys.dtype != torch.bfloat16:
            raise LayoutError(f"pages by pairs are bfloat16, got {keys.dtype}")
        if len(values) != len(keys) or self._sizes[0][:2] != self._sizes[1][:2]:
            raise LayoutError(f"K {list(keys.shape)} and V {list(values.shape)} do not fit")
        if not 1 <= self.block_size <= MOST_TOKENS:
            raise LayoutError(f"pages of {self.block_size} tokens are not supported: 1 to {MOST_TOKENS}")
        for size in (self.key_size, self.value_size):
            if size % 16 or not 16 <= size <= MOST_SIZE:
                raise LayoutError(f"head size {size} is not supported: multiples of 16 up to {MOST_SIZE}")
        if any(stride < 0 for stride in (*keys.stride(), *values.stride())):
            raise LayoutError("pages have negative strides")

    @classmethod
    def of_pool(cls, keys: Tensor, values: Tensor) -> LayerPages:
        """Pages `[pages, t, h, d]` and `[pages, t, h, dv]`, K by rows or by columns.

        Raises:
            LayoutError: see the class; or neither order.
        """
        if keys.dim() != 4 or values.dim() != 4:
            raise LayoutError(f"pages must be [pages, t, h, d], got {list(keys.shape)} and {list(values.shape)}")
        if values.stride(3) != 1 or 1 not in (keys.stride(1), keys.stride(3)):
            raise LayoutError(f"pages with strides {keys.stride()} and {values.stride()} were never seen")
        return cls(keys, values, "rows" if keys.stride(3) == 1 else "columns")

    @classmethod
    def of_engine(cls, cache: Tensor, isa: str) -> LayerPages:
        """The KV cache of a layer of vLLM's CPU backend, `[pages, h, t, 2d]`, in the order of its `isa`.

        Raises:
            LayoutError: see the class; or an instruction set whose order was never seen.
        """
        if isa not in ENGINE_ORDERS:
            raise LayoutError(f"vLLM's page layout {isa!r} was never seen; known are {', '.join(ENGINE_ORDERS)}")
        if cache.dim() != 4 or not cache[0].is_contiguous() or cache.shape[3] % 2:
            raise LayoutError(f"a KV cache {list(cache.shape)} with strides {cache.stride()} was never seen")
        pages, heads, tokens, size = *cache.shape[:3], cache.shape[3] // 2
        keys, values = cache.view(pages, heads, 2, tokens * size).unbind(2)
        if ENGINE_ORDERS[isa] == "columns":
            by_column = keys.unflatten(2, (size, tokens)).permute(0, 3, 1, 2)
            return cls(by_column, values.unflatten(2, (tokens, size)).transpose(1, 2), "columns")
        if tokens % 32 or size % 32:
            raise LayoutError(f"pages of {tokens} tokens and head size {size} cannot lie by pairs: multiples of 32")
        by_pairs = keys.unflatten(2, (tokens // PAIRS, size // 2, PAIRS, 2))
        return cls(by_pairs, values.unflatten(2, (size // PAIRS, tokens // 2, PAIRS, 2)), "pairs")

    @property
    def num_pages(self) -> int:
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @cached_property
    def _sizes(self) -> tuple[torch.Size, torch.Size]:
        """Of a page's K and V: tokens, heads, head size."""
        keys, values = self.read(slice(0))
        return keys.shape[1:], values.shape[1:]

    @property
    def block_size(self) -> int:
        """Tokens per page."""
        return self._sizes[0][0]

    @property
    def num_heads(self) -> int:
        return self._sizes[0][1]

    @property
    def key_size(self) -> int:
        return self._sizes[0][2]

    @property
    def value_size(self) -> int:
        return self._sizes[1][2]

    def read(self, chosen: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """K `[pages, t, h, d]` and V `[pages, t, h, dv]`: views where possible, or copies of the pages `chosen`."""
        keys, values = (part[chosen] for part in (self.keys, self.values))
        if self.order != "pairs":
            return keys, values
        keys = keys.permute(0, 2, 4, 1, 3, 5).flatten(4, 5).flatten(1, 2)
        values = values.permute(0, 3, 5, 1, 2, 4).flatten(4, 5).flatten(1, 2)
        return keys, values

    def confirm(self, write: Callable[[Tensor, Tensor, Tensor], None], page: int) -> None:
        """Make sure that what `write(key, value, slots)` puts into the unused `page` is found here; zeroes the page.

        Args:
            write: the engine's own way of writing tokens `[t, h, d]` and `[t, h, dv]` to slots `[t]`.

        Raises:
            LayoutError: something else is found.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (self.block_size, self.num_heads)
        key, value = (
            torch.randn(*shape, size, generator=generator).to(self.keys) for size in (self.key_size, self.value_size)
        )
        write(key, value, page * self.block_size + torch.arange(self.block_size, device=self.device))
        found = [part[page] for part in self.read()]
        agrees = torch.equal(found[0], key) and torch.equal(found[1], value)
        self.keys[page].zero_()
        self.values[page].zero_()
        if not agrees:
            raise LayoutError(f"pages are not kept {self.order!r} as believed; this layout was never seen")
