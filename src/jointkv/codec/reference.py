"""Pages the receiver has already, or has one within the bound of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from jointkv.codec.base import Aids, Codec
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.turning import moved
from jointkv.errors import BadInput


class Reference(Codec):
    """Nothing is sent: the reference page stands for the page, its keys turned to the page's position."""

    name: ClassVar[str] = "reference"
    number: ClassVar[int] = 3

    def encode(self, pages: Pages, aids: Aids) -> list[bytes]:
        return [b""] * len(pages)

    def decode(self, payloads: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids) -> Pages:
        if any(payloads):
            raise BadInput("a page that is a reference holds numbers")
        return moved(aids.the_references(), positions, aids.transform)
