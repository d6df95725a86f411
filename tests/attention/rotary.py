"""Turning queries by a number of positions, for block references with a shift."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Style = Literal["neox", "gptj"]


def rotary_turn(query: Tensor, positions: Tensor, frequencies: Tensor, style: Style = "neox") -> Tensor:
    """Turn `query [n, heads, d]` by `positions [n]`, as rotary position embedding does (Su et al., arXiv 2104.09864).

    Args:
        frequencies: angle per position of each pair of coordinates, `[rotary d / 2]` (`inv_freq` of the model);
            coordinates beyond `rotary d` stay as they are (partial rotary).
        style: `"neox"` pairs coordinate `i` with `i + rotary d / 2`; `"gptj"` pairs neighbours.
    """
    half = frequencies.shape[0]
    angle = positions[:, None, None] * frequencies.to(torch.promote_types(query.dtype, torch.float32))
    cos, sin = angle.cos().to(query.dtype), angle.sin().to(query.dtype)
    rotary, rest = query[..., : 2 * half], query[..., 2 * half :]
    if style == "neox":
        first, second = rotary[..., :half], rotary[..., half:]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    else:
        first, second = rotary[..., 0::2], rotary[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    return torch.cat((turned, rest), -1)
