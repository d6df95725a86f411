"""Orders of elements inside a page, and caches written in them: shared by the tests.

An order is the slot of each element `[elements]`: a token of K, or `tokens` plus a token of V.
"""

import torch
from torch import Tensor

from jointkv.core.blocks import PagedKV
from jointkv.core.packed import PackedPages


def row_major(tokens: int, key_size: int, value_size: int) -> Tensor:
    """All tokens of K, then all of V."""
    token = torch.arange(tokens)
    return torch.cat((token.repeat_interleave(key_size), tokens + token.repeat_interleave(value_size)))


def vnni(heads: int, size: int) -> Tensor:
    """16 tokens: per head K as `[size / 2][token][2]` and V as `[token / 2][size][2]`."""
    token = torch.arange(16)
    keys = token.repeat_interleave(2).repeat(size // 2)
    values = token.view(8, 1, 2).expand(8, size, 2).flatten()
    return torch.cat((keys.repeat(heads), 16 + values.repeat(heads)))


def shuffled(slots: Tensor, generator: torch.Generator) -> Tensor:
    return slots[torch.randperm(len(slots), generator=generator)]


def pack(
    keys: list[Tensor], values: list[Tensor], dtype: torch.dtype, slots: Tensor, gap: int = 0
) -> tuple[PagedKV, PackedPages]:
    """K and V, per layer `[pages, t, h, d]`, rounded to `dtype`: a plain float32 cache, and pages in the order `slots`.

    `gap` elements of NaN follow each page.
    """
    keys, values = ([layer.to(dtype) for layer in layers] for layers in (keys, values))
    pages, tokens = keys[0].shape[:2]
    by_token = torch.empty_like(slots)
    by_token[slots.argsort(stable=True)] = torch.arange(len(slots))
    layers = []
    for key, value in zip(keys, values, strict=True):
        held = torch.full((pages, len(slots) + gap), torch.nan).to(dtype)
        plain = torch.cat((key.float().flatten(1), value.float().flatten(1)), 1)
        held[:, : len(slots)] = plain[:, by_token].to(dtype)
        layers.append(held[:, : len(slots)])
    plain_kv = PagedKV([layer.float() for layer in keys], [layer.float() for layer in values])
    return plain_kv, PackedPages(layers, slots % tokens, slots >= tokens)
