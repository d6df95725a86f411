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

    Raises:
        BadInput: a level that there is not, or something else in the place of the others.
    """

    transform: Transform | None = None
    references: Pages | None = None
    level: int = START_LEVEL

    def __post_init__(self) -> None:
        if type(self.level) is not int or not 0 <= self.level < LEVELS:
            raise BadInput(f"level must be 0 to {LEVELS - 1}, got {self.level!r}")
        for name, given, kind in (("transform", self.transform, Transform), ("references", self.references, Pages)):
            if not (given is None or isinstance(given, kind)):
                raise BadInput(f"{name}: a {kind.__name__} is needed, or None, not {type(given).__name__}")

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
