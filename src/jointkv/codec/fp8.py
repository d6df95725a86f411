"""Pages as 8-bit floating-point numbers, as vLLM's `--kv-cache-dtype fp8` holds them; here for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from jointkv.codec.base import Aids, Codec
from jointkv.codec.pages import Layout, Pages
from jointkv.errors import BadInput

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Float8(Codec):
    """e4m3 without scales; what is larger than 448 is cut to that."""

    name: ClassVar[str] = "fp8"
    number: ClassVar[int] = 6

    def encode(self, pages: Pages, aids: Aids) -> list[bytes]:
        sides = (side.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn) for side in (pages.keys, pages.values))
        flat = [side.view(torch.uint8).transpose(0, 1).reshape(len(pages), -1) for side in sides]
        return [page.numpy().tobytes() for page in torch.cat(flat, 1)]

    def decode(self, payloads: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids) -> Pages:
        split = layout.key_numbers
        if any(len(payload) != split + layout.value_numbers for payload in payloads):
            raise BadInput("a page of 8-bit numbers has another size")
        content = torch.from_numpy(np.stack([np.frombuffer(payload, np.uint8) for payload in payloads]))
        pages = Pages.empty(layout, positions)
        for side, part in ((pages.keys, content[:, :split]), (pages.values, content[:, split:])):
            numbers = part.contiguous().view(torch.float8_e4m3fn).float()
            side.copy_(numbers.view(len(payloads), layout.layers, *side.shape[2:]).transpose(0, 1))
        return pages
