"""Reads an engine's KV pages without guessing: how tokens lie in a page is found by writing marked tokens.

Multi-head latent attention keeps one latent vector of a token for all heads, and a rotary part of K beside it. They
take the places of V and K: what is bounded is the error of what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jointkv.core.packed import PACKED_DTYPES, PackedPages
from jointkv.errors import LayoutError

FLOAT8_FORMATS = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_inc": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""`kv_cache_dtype`s of one byte a number with one scale a layer, which cancels in relative errors."""

NULL_PAGE = 0
"""vLLM's null block, which holds nothing: in a table, a slot that reads what no page of its own holds."""

PROBED_PAGE = 1
"""At the start no page is in use."""


def packed_pages(layers: Sequence[Any], num_blocks: int, block_size: int) -> PackedPages:
    """A view of the pages of attention `layers` (vLLM `Attention` modules whose caches are bound).

    Each layer writes marked tokens through its own backend into one unused page, which is zeroed again: whatever
    order the instruction set wants is read off, never assumed.

    Raises:
        LayoutError: pages are not contiguous blocks of the cache tensor, an element belongs to no token, or layers
            differ in shape, dtype or order.
    """
    views, orders = [], []
    for layer in layers:
        cache = layer.kv_cache
        pages = _page_rows(cache, num_blocks)
        views.append(_as_numbers(pages, layer))
        orders.append(_probe(layer, pages, block_size))
    token_of, is_value = orders[0]
    for other_tokens, other_sides in orders[1:]:
        if not torch.equal(token_of, other_tokens) or not torch.equal(is_value, other_sides):
            raise LayoutError("the layers of a group keep their pages in different orders")
    return PackedPages(views, token_of, is_value)


def number_order(layers: Sequence[Any], num_blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Which element of a page is which number: of K long `[tokens, heads, size]`, of V likewise; found as above.

    Args:
        layers: attention layers whose pages `packed_pages` could read.

    Raises:
        LayoutError: an element is no number of its token alone, or layers differ.
    """
    token_of, is_value = _probe(layers[0], _page_rows(layers[0].kv_cache, num_blocks), block_size)
    orders = [_probe_numbers(layer, _page_rows(layer.kv_cache, num_blocks), block_size, is_value) for layer in layers]
    if any(not torch.equal(orders[0], other) for other in orders[1:]):
        raise LayoutError("the layers of a group keep the numbers of a token in different orders")
    sides = []
    for side, size in ((~is_value, layers[0].head_size), (is_value, _value_size(layers[0]))):
        (elements,) = side.nonzero(as_tuple=True)
        heads = len(elements) // (block_size * size)
        place = token_of[elements] * heads * size + orders[0][elements]
        if len(elements) != block_size * heads * size or not torch.equal(place.sort().values, torch.arange(len(place))):
            raise LayoutError("the numbers of a token do not fill its part of a page")
        sides.append(elements[place.argsort()].view(block_size, heads, size))
    return sides[0], sides[1]


def _probe_numbers(layer: Any, pages: Tensor, block_size: int, is_value: Tensor) -> Tensor:
    """Which number of its token, all heads one after another, every element of a page is."""
    numbers, heads = _as_numbers(pages, layer), layer.num_kv_heads
    sizes = layer.head_size, _value_size(layer)
    number_of = torch.zeros(pages.shape[1], dtype=torch.long)
    for bit in range((heads * max(sizes) - 1).bit_length()):
        marks = [1 + (torch.arange(heads * size, device=pages.device) >> bit & 1) for size in sizes]
        key, value = (mark.to(getattr(layer, "dtype", numbers.dtype)) for mark in marks)
        _write_marks(layer, key, value, block_size)
        read = numbers[PROBED_PAGE].to("cpu", torch.float32, copy=True)
        pages[PROBED_PAGE].zero_()
        for side in (is_value, ~is_value):  # K and V may have scales of their own
            number_of[side] |= (read[side] > 1.4 * read[side].min()).long() << bit
    return number_of


def _write_marks(layer: Any, key: Tensor, value: Tensor, block_size: int) -> None:
    """Have the layer's backend write `key [heads * size]` and `value` for every token of the probed page."""
    slots = PROBED_PAGE * block_size + torch.arange(block_size, device=key.device)
    sides = (side.view(layer.num_kv_heads, -1).expand(block_size, -1, -1).contiguous() for side in (key, value))
    layer.impl.do_kv_cache_update(layer, *sides, layer.kv_cache, slots)


def _value_size(layer: Any) -> int:
    return int(getattr(layer, "head_size_v", layer.head_size))


def _page_rows(cache: Any, num_blocks: int) -> Tensor:
    """The cache tensor as `[pages, elements]` in the order in which they lie, a view."""
    if not isinstance(cache, Tensor) or cache.shape[:1] != (num_blocks,):
        shape = list(cache.shape) if isinstance(cache, Tensor) else type(cache).__name__
        raise LayoutError(f"the engine's KV cache is not one tensor of {num_blocks} pages, but {shape}")
    page = cache[0]
    if not page.permute(sorted(range(page.dim()), key=page.stride, reverse=True)).is_contiguous():
        raise LayoutError(f"a page is not contiguous: shape {list(cache.shape)}, strides {list(cache.stride())}")
    return cache.as_strided((num_blocks, page.numel()), (cache.stride(0), 1))


def _as_numbers(pages: Tensor, layer: Any) -> Tensor:
    """Pages of bytes are fp8 numbers, in formats that keep no scales of tokens or heads beside them."""
    name = str(layer.kv_cache_dtype)
    dtype = pages.dtype if pages.itemsize > 1 else FLOAT8_FORMATS.get(name)
    if dtype not in PACKED_DTYPES or pages.dtype not in (dtype, torch.uint8):
        raise LayoutError(f"KV pages of kv_cache_dtype {name!r}, stored as {pages.dtype}, are not supported")
    return pages.view(dtype)


def _probe(layer: Any, pages: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Token and side of every element of a page, from what the layer's backend writes for marked tokens."""
    numbers = _as_numbers(pages, layer)
    tokens = torch.arange(block_size, device=pages.device)
    slots = PROBED_PAGE * block_size + tokens
    token_of = torch.zeros(pages.shape[1], dtype=torch.long)
    is_value = torch.zeros(pages.shape[1], dtype=torch.bool)
    for bit in range(max(1, (block_size - 1).bit_length())):
        # 2 or 1, exact in every dtype; keys positive, values negative.
        mark = (1 + (tokens >> bit & 1)).to(getattr(layer, "dtype", numbers.dtype))
        _write(layer, mark, slots)
        read = numbers[PROBED_PAGE].to("cpu", torch.float32, copy=True)
        pages[PROBED_PAGE].zero_()
        if not read.isfinite().all() or (read == 0).any():
            raise LayoutError("a page has elements that belong to no token; this layout was never seen")
        is_value = read < 0
        for side in (is_value, ~is_value):  # K and V may have scales of their own
            token_of[side] |= (read[side].abs() > 1.4 * read[side].abs().min()).long() << bit
    return token_of, is_value


def _write(layer: Any, mark: Tensor, slots: Tensor) -> None:
    """Have the layer's backend write K full of `mark [tokens]`, and V full of its opposite, to `slots [tokens]`."""
    backend = getattr(layer, "impl", None)
    if backend is None:
        raise LayoutError(f"a layer of kind {type(layer).__name__} does not say how it writes pages")
    if hasattr(layer, "kv_lora_rank"):  # latent attention
        sizes = layer.kv_lora_rank, layer.qk_rope_head_dim
        latent, rotary = (mark[:, None].expand(-1, size).contiguous() for size in sizes)
        scale = torch.ones((), device=slots.device)
        backend.do_kv_cache_update(-latent, rotary[:, None], layer.kv_cache, slots, layer.kv_cache_dtype, scale)
        return
    heads, size = layer.num_kv_heads, layer.head_size
    key, value = (
        (sign * mark)[:, None, None].expand(-1, heads, size).contiguous()
        for sign, size in ((1, size), (-1, _value_size(layer)))
    )
    backend.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
