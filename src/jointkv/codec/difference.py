"""Pages as what they have over a reference page that the receiver holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from jointkv.codec import quantised
from jointkv.codec.base import Aids, Codec
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.transform import positions_of, turned_back
from jointkv.codec.turning import moved
from jointkv.errors import LayoutError


class Difference(Codec):
    """The reference's keys are turned to the page's position; what is left goes the way of `alone`, without a mean."""

    name: ClassVar[str] = "difference"
    number: ClassVar[int] = 5

    def encode(self, pages: Pages, aids: Aids) -> list[bytes]:
        transform, references = aids.the_transform(), aids.the_references()
        transform.check(pages.layout)
        if references.layout != pages.layout or len(references) != len(pages):
            raise LayoutError("every page needs one reference of its own layout")
        predicted = moved(references, pages.positions, transform)
        left = Pages(
            pages.keys.float() - predicted.keys.float(),
            pages.values.float() - predicted.values.float(),
            pages.positions,
        )
        keys, values = turned_back(left, transform.rotary)
        return quantised.encode(keys, values, pages, transform, aids.level)

    def decode(self, payloads: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids) -> Pages:
        transform, references = aids.the_transform(), aids.the_references()
        if references.layout != layout or len(references) != len(payloads):
            raise LayoutError("every page needs one reference of its own layout")
        keys, values, rest = quantised.decode(payloads, layout, positions, transform)
        predicted = moved(references, positions, transform)
        pages = Pages.empty(layout, positions)
        shift = positions_of(pages).flatten()
        shape = (len(shift), layout.heads, layout.key_size)
        for layer, rotary in enumerate(transform.rotary):
            turned = rotary.turn(keys[layer].view(shape), shift).view_as(pages.keys[layer])
            pages.keys[layer] = predicted.keys[layer].float() + turned
        pages.values.copy_(predicted.values.float() + values.view_as(pages.values))
        quantised.put_first_tokens(pages, rest)
        return pages
