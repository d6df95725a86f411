"""Keys of pages at another position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jointkv.attention.rotary import Rotary, Turning
from jointkv.codec.pages import Pages
from jointkv.codec.transform import Transform
from jointkv.errors import BadInput


def turn_pages(keys: Tensor, shift: Tensor, rotary: Sequence[Rotary]) -> Tensor:
    """Keys `[layers, n, t, h, d]`, each page turned on by `shift [n]` tokens."""
    turning = Turning(rotary, shift)
    return torch.stack([turning(layer, side) for layer, side in enumerate(keys)])


def moved(pages: Pages, positions: Tensor, transform: Transform | None) -> Pages:
    """`pages` as they would be with the same text at `positions [n]`.

    Raises:
        BadInput: they move, and no transform says how keys are turned.
    """
    shift = positions - pages.positions
    if not shift.any():
        return Pages(pages.keys, pages.values, positions)
    if transform is None:
        raise BadInput("pages of text that moved need the transform, which knows how keys are turned")
    keys, still = turn_pages(pages.keys, shift, transform.rotary), shift == 0
    keys[:, still] = pages.keys[:, still]  # not even rounded
    return Pages(keys, pages.values, positions)
