"""Pages quantised by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from jointkv.codec import quantised
from jointkv.codec.base import Aids, Codec
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.transform import positions_of, turned_back


class Alone(Codec):
    """What a token has over the mean of its layer, in components of the transform, as whole steps."""

    name: ClassVar[str] = "alone"
    number: ClassVar[int] = 4

    def encode(self, pages: Pages, aids: Aids) -> list[bytes]:
        transform = aids.the_transform()
        transform.check(pages.layout)
        keys, values = turned_back(pages, transform.rotary)
        # Not in place: they may be the pages themselves.
        keys, values = keys - transform.key.mean[:, None], values - transform.value.mean[:, None]
        return quantised.encode(keys, values, pages, transform, aids.level)

    def decode(self, payloads: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids) -> Pages:
        transform = aids.the_transform()
        keys, values, rest = quantised.decode(payloads, layout, positions, transform)
        keys += transform.key.mean[:, None]
        values += transform.value.mean[:, None]
        pages = Pages.empty(layout, positions)
        shift = positions_of(pages).flatten()
        shape = (len(shift), layout.heads, layout.key_size)
        for layer, rotary in enumerate(transform.rotary):
            pages.keys[layer] = rotary.turn(keys[layer].view(shape), shift).view_as(pages.keys[layer])
        pages.values.copy_(values.view_as(pages.values))
        quantised.put_first_tokens(pages, rest)
        return pages
