"""The first tokens of a text, which are sent as they are: attention leans on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jointkv.codec.packing import pack_floats, unpack_floats
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.transform import KEPT_TOKENS
from jointkv.errors import BadInput


def kept_tokens(positions: Tensor, layout: Layout) -> Tensor:
    """Which tokens are sent as they are, bool `[n, t]`."""
    return positions[:, None] + torch.arange(layout.block_size) < KEPT_TOKENS


def first_tokens(pages: Pages, references: Pages | None, kept: Tensor) -> list[bytes]:
    """Those of each page that are `kept`, bool `[n, t]`, without loss: what their bits have over the reference's."""
    made = []
    for number, chosen in enumerate(kept):
        if not chosen.any():
            made.append(b"")
            continue
        content = _content(pages, number, chosen) ^ _expected(pages, references, number, chosen)
        made.append(pack_floats(content, pages.layout.dtype.itemsize))
    return made


def put_first_tokens(pages: Pages, references: Pages | None, rest: Sequence[memoryview]) -> None:
    """Write the first tokens of a text, as they were sent, into `pages`. Raises BadInput if they were not."""
    layout = pages.layout
    for number, (chosen, data) in enumerate(zip(kept_tokens(pages.positions, layout), rest, strict=True)):
        count = int(chosen.sum())
        if not count:
            if len(data):
                raise BadInput("a page holds more than it should")
            continue
        share = count * layout.page_nbytes // layout.block_size
        sent = unpack_floats(data, share, layout.dtype.itemsize) ^ _expected(pages, references, number, chosen)
        content = torch.from_numpy(sent)
        cut = layout.key_numbers // layout.block_size * count * layout.dtype.itemsize
        for side, part in ((pages.keys, content[:cut]), (pages.values, content[cut:])):
            numbers = part.contiguous().view(layout.dtype)
            side[:, number, chosen] = numbers.view(layout.layers, count, layout.heads, side.shape[-1])


def _expected(pages: Pages, references: Pages | None, number: int, chosen: Tensor) -> NDArray[np.uint8]:
    """The bytes of the reference's tokens; only in their place, for turning keys rounds otherwise elsewhere."""
    if references is None or references.positions[number] != pages.positions[number]:
        return np.zeros(1, np.uint8)
    return _content(references, number, chosen)


def _content(pages: Pages, number: int, chosen: Tensor) -> NDArray[np.uint8]:
    """The bytes of the `chosen` tokens of a page: K, then V."""
    sides = [side[:, number, chosen].contiguous().view(torch.uint8).flatten() for side in (pages.keys, pages.values)]
    return np.asarray(torch.cat(sides).numpy())
