"""Which codec a page takes: the smallest that keeps the bound, checked on what the receiver will decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.codec.base import LEVELS, START_LEVEL, Aids
from jointkv.codec.pages import Errors, Pages
from jointkv.codec.registry import CODECS, decode, encode
from jointkv.codec.transform import Transform
from jointkv.errors import BadInput
from jointkv.system.values import is_number

BATCH = 32
"""Pages at a time, so that what is computed in between stays small."""

FINER = 4
"""Levels between one try and the next: half the step."""

TRIES = 4

ROUNDING = 0.99
"""Share of the bound that is used: another machine's float32 rounds the last bits in another way."""

USEFUL = 0.5
"""Beyond this relative error of K or V, a reference says no more of a page than the mean does."""


@dataclass(frozen=True)
class Bound:
    """Largest relative errors of a decoded page, root mean square over its layers; 0 asks for equal bytes.

    Attributes:
        block: of K and of V of the whole page.
        token: of its worst token.
    """

    block: float = 0.2
    token: float = 0.3

    def __post_init__(self) -> None:
        if not all(is_number(bound) and 0 <= bound < 1 for bound in (self.block, self.token)):
            raise BadInput(f"bounds of a page are at least 0 and below 1, got {self.block!r} and {self.token!r}")

    def within(self, errors: Errors) -> Tensor:
        """Which pages keep it, bool `[n]`; not a number does not."""
        block, token = self.block * ROUNDING, self.token * ROUNDING
        return (errors.key <= block) & (errors.value <= block) & (errors.token <= token)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Messages of `n` pages, and what the receiver reads.

    Attributes:
        messages: one per page; the first byte names the codec.
        decoded: the pages as they will be decoded.
        errors: of those.
    """

    messages: list[bytes]
    decoded: Pages
    errors: Errors

    @property
    def codecs(self) -> list[str]:
        """Name of the codec of each page."""
        names = {codec.number: name for name, codec in CODECS.items()}
        return [names[message[0]] for message in self.messages]


class Chooser:
    """Encodes pages of one model within a bound.

    Args:
        bound: kept by every page, or the page is sent without loss.
        transform: of the model; without one, pages are references or lossless.
        level: of the first try, see `jointkv.codec.base.step_share`.
    """

    def __init__(self, bound: Bound, transform: Transform | None = None, level: int = START_LEVEL) -> None:
        if not isinstance(bound, Bound):
            raise BadInput(f"the bound of pages is a Bound, as in Chooser(Bound(0.2, 0.3)); got {bound!r}")
        Aids(transform, level=level)
        self.bound, self.transform, self.level = bound, transform, level

    def encode(self, pages: Pages, references: Pages | None = None, has: Tensor | None = None) -> Encoded:
        """Messages for all of `pages`.

        Args:
            references: a page of the receiver for each page, byte for byte as the receiver has it.
            has: which of them are there, bool `[n]`; default all.

        Raises:
            ModelMismatch: pages of another layout than the transform's.
        """
        there = torch.full((len(pages),), references is not None) if has is None else has
        parts = []
        for start in range(0, len(pages), BATCH):
            index = torch.arange(start, min(start + BATCH, len(pages)))
            given = None if references is None else references.take(index)
            parts.append(self._encode(pages.take(index), given, there[index]))
        if not parts:
            return Encoded([], pages, pages.errors(pages))
        return _joined(parts)

    def _encode(self, pages: Pages, references: Pages | None, has: Tensor) -> Encoded:
        work = _Work(pages)
        if references is not None and has.any():
            self._from_references(work, references, has)
        if self.transform is not None and self.bound.block > 0:
            for attempt in range(TRIES):
                self._try(work, "alone", work.open(), None, self.level + attempt * FINER)
        self._exactly(work)
        return Encoded([message or b"" for message in work.messages], work.decoded, pages.errors(work.decoded))

    def _from_references(self, work: _Work, references: Pages, has: Tensor) -> None:
        if self.transform is None:  # nothing says how keys are turned
            has = has & (references.positions == work.pages.positions)
        index = has.nonzero()[:, 0]
        near = self._try(work, "reference", index, references, self.level)
        if self.transform is None or self.bound.block == 0:
            return
        useful = set(index[(near.key < USEFUL) & (near.value < USEFUL)].tolist())
        for attempt in range(TRIES):
            left = [number for number in work.open().tolist() if number in useful]
            index = torch.tensor(left, dtype=torch.long)
            self._try(work, "difference", index, references, self.level + attempt * FINER)

    def _try(self, work: _Work, codec: str, index: Tensor, references: Pages | None, level: int) -> Errors:
        """Encode the pages `index` and keep those within the bound; errors of all of them."""
        if not len(index) or level >= LEVELS:
            return Errors(*(torch.zeros(0),) * 3)
        aids = Aids(self.transform, None if references is None else references.take(index), level)
        pages = work.pages.take(index)
        messages = encode(CODECS[codec], pages, aids)
        decoded = decode(messages, pages.layout, pages.positions, aids)
        errors = pages.errors(decoded)
        equal = (pages.content == decoded.content).all(1)
        within = equal if self.bound.block == 0 else equal | self.bound.within(errors)
        work.keep(index[within], [messages[i] for i in within.nonzero()[:, 0].tolist()], decoded.take(within))
        return errors

    @staticmethod
    def _exactly(work: _Work) -> None:
        """Send what is left without loss, as it is where that is no longer."""
        index = work.open()
        if not len(index):
            return
        pages = work.pages.take(index)
        packed, plain = (encode(CODECS[name], pages, Aids()) for name in ("lossless", "raw"))
        work.keep(index, [min(pair, key=len) for pair in zip(packed, plain, strict=True)], pages)


class _Work:
    """Pages on the way: messages of those that are done."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.messages: list[bytes | None] = [None] * len(pages)
        self.decoded = Pages.empty(pages.layout, pages.positions)

    def open(self) -> Tensor:
        """Which pages have no message yet, long `[m]`."""
        return torch.tensor([i for i, message in enumerate(self.messages) if message is None], dtype=torch.long)

    def keep(self, index: Tensor, messages: Sequence[bytes], decoded: Pages) -> None:
        numbers = index.tolist()
        for number, message in zip(numbers, messages, strict=True):
            self.messages[number] = message
        if numbers:
            self.decoded.put(numbers, decoded)


def _joined(parts: Sequence[Encoded]) -> Encoded:
    decoded = Pages(
        torch.cat([part.decoded.keys for part in parts], 1),
        torch.cat([part.decoded.values for part in parts], 1),
        torch.cat([part.decoded.positions for part in parts]),
    )
    errors = Errors(*(torch.cat(error) for error in zip(*(part.errors for part in parts), strict=True)))
    return Encoded([message for part in parts for message in part.messages], decoded, errors)
