"""Pages as 4-bit numbers, after KIVI (arXiv 2402.02750): K in groups of a channel, V in groups of a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from jointkv.codec.base import Aids, Codec
from jointkv.codec.pages import Layout, Pages
from jointkv.errors import BadInput, LayoutError

GROUP = 32
MOST = 15


class Int4(Codec):
    """Each group has a least number and a step in 16 bits; for comparison."""

    name: ClassVar[str] = "int4"
    number: ClassVar[int] = 7

    def encode(self, pages: Pages, aids: Aids) -> list[bytes]:
        keys, values = _groups(pages)
        parts = [part for side in (keys, values) for part in _quantised(side)]
        return [page.numpy().tobytes() for page in torch.cat(parts, 1)]

    def decode(self, payloads: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids) -> Pages:
        pages = Pages.empty(layout, positions)
        sizes = []
        for groups in _groups(pages):
            count, size = groups.shape[1:]
            sizes += [count * size // 2, 2 * count, 2 * count]
        if any(len(payload) != sum(sizes) for payload in payloads):
            raise BadInput("a page of 4-bit numbers has another size")
        content = torch.from_numpy(np.stack([np.frombuffer(payload, np.uint8) for payload in payloads]))
        parts = content.split(sizes, 1)
        keys, values = _restored(*parts[:3]), _restored(*parts[3:])
        n, t = len(payloads), layout.block_size
        shape = (n, layout.layers, layout.heads, layout.key_size, t)
        pages.keys.copy_(keys.view(shape).permute(1, 0, 4, 2, 3))
        pages.values.copy_(values.view(n, layout.layers, *pages.values.shape[2:]).transpose(0, 1))
        return pages


def _groups(pages: Pages) -> tuple[Tensor, Tensor]:
    """Numbers that share a step, float32 `[n, groups, numbers]`: channels of a page in K, parts of a token in V."""
    layout = pages.layout
    if layout.block_size % 2 or layout.value_size % GROUP:
        raise LayoutError(f"4-bit pages need an even block size and heads of a multiple of {GROUP} numbers")
    keys = pages.keys.float().permute(1, 0, 3, 4, 2)
    values = pages.values.float().transpose(0, 1)
    return keys.reshape(len(pages), -1, layout.block_size), values.reshape(len(pages), -1, GROUP)


def _quantised(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    least, most = groups.amin(-1), groups.amax(-1)
    least, step = least.half(), ((most - least) / MOST).half()
    units = (groups - least[..., None].float()) / step[..., None].float().clamp(min=1e-8)
    numbers = units.round().clamp(0, MOST).to(torch.uint8).flatten(1)
    packed = numbers[:, ::2] | numbers[:, 1::2] << 4
    return packed, least.view(torch.uint8), step.view(torch.uint8)


def _restored(packed: Tensor, least: Tensor, step: Tensor) -> Tensor:
    offset, scale = (part.contiguous().view(torch.half).float() for part in (least, step))
    numbers = torch.stack((packed & 15, packed >> 4), -1).float().view(*offset.shape, -1)
    return numbers * scale[..., None] + offset[..., None]
