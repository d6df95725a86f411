"""Pages as what they have over a reference page that the receiver holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from jointkv.codec import quantised
from jointkv.codec.base import Aids, Codec
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.transform import Transform, rows_of
from jointkv.errors import LayoutError


class Difference(Codec):
    """What a token has over the reference's or over the mean, whichever is nearer; what is left goes as in `alone`."""

    name: ClassVar[str] = "difference"
    number: ClassVar[int] = 9

    def encode(self, pages: Pages, aids: Aids) -> list[bytes]:
        transform, references = aids.the_transform(), aids.the_references()
        transform.check(pages.layout)
        if references.layout != pages.layout or len(references) != len(pages):
            raise LayoutError("every page needs one reference of its own layout")
        mask = nearer(pages, references, transform)
        return quantised.encode(pages, quantised.Prediction(transform, references, mask), aids.level)

    def decode(self, payloads: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids) -> Pages:
        references = aids.the_references()
        if references.layout != layout or len(references) != len(payloads):
            raise LayoutError("every page needs one reference of its own layout")
        return quantised.decode(payloads, layout, positions, aids, references)


def nearer(pages: Pages, references: Pages, transform: Transform) -> Tensor:
    """Which tokens are nearer to those of the reference, turned to their place, than to the mean, bool `[n, t]`.

    Layers count by the steps they are quantised in.
    """
    n, size = pages.keys.shape[1:3]
    advantage = torch.zeros(n * size)
    means = (*transform.key.mean, *transform.value.mean)
    rows = zip(rows_of(pages, transform.rotary), rows_of(references, transform.rotary), strict=True)
    for (own, other), mean, (_, unit) in zip(rows, means, transform.layers, strict=True):
        apart, alone = (torch.linalg.vector_norm(own - expected, dim=1) for expected in (other, mean))
        advantage += (alone.square() - apart.square()) / unit**2
    return (advantage > 0).view(n, size)
