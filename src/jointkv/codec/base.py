"""What a codec is, and what it is given besides the pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from jointkv.codec.pages import Layout, Pages
from jointkv.codec.transform import Transform
from jointkv.errors import BadInput

QUANTISED_FORMAT = 2
"""Of the payloads of `alone` and `difference`; another layout of bytes takes another number, there and here."""

LEVELS = 40
"""Steps of quantisation: each is finer than the one before by the fourth root of 2."""

START_LEVEL = 14


def step_share(level: int) -> float:
    """The step of `level` as a share of a layer's unit, see `Transform`."""
    return float(4.0 * 2.0 ** (-level / 4))


@dataclass(frozen=True, eq=False)
class Aids:
    """What both ends have.

    Attributes:
        transform: of the pages' model; codecs that need none ignore it.
        references: a page for each page, as the receiver has it, byte for byte.
        level: how finely numbers are quantised, see `step_share`; read from the payload where one is decoded.
    """

    transform: Transform | None = None
    references: Pages | None = None
    level: int = START_LEVEL

    def the_transform(self) -> Transform:
        """Raises BadInput if there is none."""
        if self.transform is None:
            raise BadInput("these pages need the transform they were encoded with; fit one with Transform.fit")
        return self.transform

    def the_references(self) -> Pages:
        """Raises BadInput if there are none."""
        if self.references is None:
            raise BadInput("these pages are differences to reference pages, which are not there")
        return self.references


class Codec(ABC):
    """Turns pages into bytes, one payload for each, and back.

    Attributes:
        name: as the user gives it.
        number: in the first byte of what is sent; never given to another codec.
        lossless: whether decoded pages are equal byte for byte.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    lossless: ClassVar[bool] = False

    @abstractmethod
    def encode(self, pages: Pages, aids: Aids) -> list[bytes]:
        """One payload per page. Raises BadInput when aids are missing."""

    @abstractmethod
    def decode(self, payloads: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids) -> Pages:
        """The pages that `encode` made `payloads` of; `positions [n]` are those of their first tokens.

        Raises:
            BadInput: a payload is malformed, or aids are missing. Whether its bytes are those that were sent, a
                checksum of whoever stores or sends it must tell.
        """
