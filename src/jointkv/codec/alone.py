"""Pages quantised by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from jointkv.codec import quantised
from jointkv.codec.base import Aids, Codec
from jointkv.codec.pages import Layout, Pages


class Alone(Codec):
    """What a token has over the mean of its layer, in components of the transform, as whole steps."""

    name: ClassVar[str] = "alone"
    number: ClassVar[int] = 8

    def encode(self, pages: Pages, aids: Aids) -> list[bytes]:
        transform = aids.the_transform()
        transform.check(pages.layout)
        return quantised.encode(pages, quantised.Prediction(transform), aids.level)

    def decode(self, payloads: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids) -> Pages:
        return quantised.decode(payloads, layout, positions, aids)
