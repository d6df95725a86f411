"""Pages as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from jointkv.codec.base import Aids, Codec
from jointkv.codec.pages import Layout, Pages
from jointkv.errors import BadInput


class Raw(Codec):
    """The bytes of the page."""

    name: ClassVar[str] = "raw"
    number: ClassVar[int] = 1
    lossless: ClassVar[bool] = True

    def encode(self, pages: Pages, aids: Aids) -> list[bytes]:
        return [page.numpy().tobytes() for page in pages.content]

    def decode(self, payloads: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids) -> Pages:
        if any(len(payload) != layout.page_nbytes for payload in payloads):
            raise BadInput(f"a page of {layout.page_nbytes} bytes was expected")
        content = np.stack([np.frombuffer(payload, np.uint8) for payload in payloads])
        return Pages.from_content(torch.from_numpy(content), layout, positions)
