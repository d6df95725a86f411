"""Reading tokens out of pages into one layer's dense K or V."""

from __future__ import annotations

import torch
from torch import Tensor


def token_slots(pages: Tensor, block_size: int, padding: Tensor, length: int) -> Tensor:
    """Where each token of left-padded sequences lies in the flattened pages.

    Args:
        pages: block tables `[rows, slots]`.
        padding: tokens of left padding per row, `[rows]`; they map to slot 0, in the null page.
        length: tokens per row, padding included.

    Returns:
        long `[rows, length]`: `page * block_size + offset`.
    """
    if not padding.any():
        offsets = torch.arange(block_size, device=pages.device)
        blocks = pages[:, : -(-length // block_size)]
        return (blocks[:, :, None] * block_size + offsets).flatten(1)[:, :length]
    if not pages.shape[1]:
        return pages.new_zeros(len(pages), length)
    token = torch.arange(length, device=pages.device) - padding[:, None]
    block = token.clamp(min=0) // block_size
    slots = pages.gather(1, block) * block_size + token % block_size
    return slots.masked_fill(token < 0, 0)


def token_scales(scale: Tensor, block_size: int, padding: Tensor, length: int) -> Tensor:
    """Spread block scales `[rows, slots]` over the tokens of left-padded rows: `[rows, length]`, 1 for padding."""
    token = torch.arange(length, device=scale.device) - padding[:, None]
    return scale.gather(1, token.clamp(min=0) // block_size).masked_fill(token < 0, 1.0)


def read_tokens(layer: Tensor, slots: Tensor, scale: Tensor | None = None) -> Tensor:
    """Copy tokens out of `layer [pages, t, h, d]`.

    Args:
        slots: `[rows, length]`, from `token_slots`.
        scale: factors per token `[rows, length]`, or None for 1.

    Returns:
        `[rows, h, length, d]`, a transposed view of a new tensor.
    """
    tokens = layer.view(-1, *layer.shape[2:]).index_select(0, slots.reshape(-1))
    tokens = tokens.view(*slots.shape, *layer.shape[2:])
    if scale is not None:
        tokens = (tokens.float() * scale[:, :, None, None]).to(layer.dtype)
    return tokens.transpose(1, 2)


def write_tokens(layer: Tensor, slots: Tensor, states: Tensor) -> None:
    """Write `states [n, h, d]` to the token slots `[n]` of `layer [pages, t, h, d]`, in place."""
    layer.view(-1, *layer.shape[2:]).index_copy_(0, slots, states)
