"""Pages compressed without loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from jointkv.codec.base import Aids, Codec
from jointkv.codec.packing import pack_floats, unpack_floats
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.threads import each


class Exact(Codec):
    """Exponents apart from mantissas, through Zstandard; bytes are equal after decoding."""

    name: ClassVar[str] = "lossless"
    number: ClassVar[int] = 2
    lossless: ClassVar[bool] = True

    def encode(self, pages: Pages, aids: Aids) -> list[bytes]:
        size = pages.layout.dtype.itemsize
        return each(lambda page: pack_floats(page.numpy(), size), pages.content)

    def decode(self, payloads: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids) -> Pages:
        size = layout.dtype.itemsize
        content = each(lambda payload: unpack_floats(payload, layout.page_nbytes, size), payloads)
        return Pages.from_content(torch.from_numpy(np.stack(content)), layout, positions)
