"""Which codec a page takes: the smallest that keeps the bound, checked on what the receiver will decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.codec.base import LEVELS, START_LEVEL, Aids
from jointkv.codec.difference import nearer
from jointkv.codec.pages import Errors, Pages
from jointkv.codec.registry import CODECS, decode, encode
from jointkv.codec.transform import Transform
from jointkv.errors import BadInput
from jointkv.system.values import is_number

BATCH = 32
"""Pages at a time, so that what is computed in between stays small."""

TRIES = 4
"""Each finer than the one before by what was lacking."""

ROUNDING = 0.99
"""Share of the bound that is used: another machine's float32 rounds the last bits in another way."""


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
        return self.used(errors) <= ROUNDING

    def used(self, errors: Errors) -> Tensor:
        """The largest share of it that an error of each page takes, `[n]`; infinite for any error where it is 0."""
        block = torch.maximum(errors.key, errors.value)
        return torch.maximum(_share(block, self.block), _share(errors.token, self.token))


def _share(error: Tensor, bound: float) -> Tensor:
    return torch.where(error == 0, 0.0, error / bound if bound else torch.inf)


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
            part = slice(start, start + BATCH)
            given = None if references is None else references.take(part)
            parts.append(self._encode(pages.take(part), given, there[part]))
        if not parts:
            return Encoded([], pages, pages.errors(pages))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _encode(self, pages: Pages, references: Pages | None, has: Tensor) -> Encoded:
        work = _Work(pages)
        if references is not None and has.any():
            self._from_references(work, references, has)
        if self.transform is not None and self.bound.block > 0:
            self._within(work, "alone", work.open(), None)
        self._exactly(work)
        return work.done()

    def _from_references(self, work: _Work, references: Pages, has: Tensor) -> None:
        if self.transform is None:  # nothing says how keys are turned
            has = has & (references.positions == work.pages.positions)
        self._try(work, "reference", has.nonzero()[:, 0], references, self.level)
        index = work.open()
        index = index[has[index]]
        if self.transform is None or self.bound.block == 0 or not len(index):
            return
        useful = nearer(work.pages.take(index), references.take(index), self.transform).any(1)
        self._within(work, "difference", index[useful], references)

    def _within(self, work: _Work, codec: str, index: Tensor, references: Pages | None) -> None:
        """Quantise the pages `index`, each in the coarsest steps that keep the bound, if any do."""
        levels = torch.full((len(index),), self.level)
        for _ in range(TRIES):
            lacking = torch.zeros(len(index))
            for level in levels.unique().tolist():
                chosen = levels == level
                errors = self._try(work, codec, index[chosen], references, level)
                lacking[chosen] = self.bound.used(errors) / ROUNDING
            # Errors grow with the step.
            levels += (4 * lacking.log2()).ceil().clamp(0, LEVELS).nan_to_num(LEVELS).long()
            again = (lacking > 1) & (levels < LEVELS)
            index, levels = index[again], levels[again]

    def _try(self, work: _Work, codec: str, index: Tensor, references: Pages | None, level: int) -> Errors:
        """Encode the pages `index` and keep those within the bound; errors of all of them."""
        if not len(index):
            return Errors(*(torch.zeros(0),) * 3)
        every = len(index) == len(work.pages)
        given = references if references is None or every else references.take(index)
        pages = work.pages if every else work.pages.take(index)
        aids = Aids(self.transform, given, level)
        messages = encode(CODECS[codec], pages, aids)
        decoded = decode(messages, pages.layout, pages.positions, aids)
        errors = pages.errors(decoded)
        within = self.bound.within(errors)
        # Where it has to be equal, 0 is not -0; and elsewhere NaN is itself.
        unsure = torch.arange(len(index)) if self.bound.block == 0 else (~within).nonzero()[:, 0]
        within[unsure] = (pages.take(unsure).content == decoded.take(unsure).content).all(1)
        work.keep(index, within, messages, decoded, errors)
        return errors

    @staticmethod
    def _exactly(work: _Work) -> None:
        """Send what is left without loss, as it is where that is no longer."""
        index = work.open()
        if not len(index):
            return
        pages = work.pages.take(index)
        packed, plain = (encode(CODECS[name], pages, Aids()) for name in ("lossless", "raw"))
        shortest = [min(pair, key=len) for pair in zip(packed, plain, strict=True)]
        work.keep(index, torch.ones(len(index), dtype=torch.bool), shortest, pages, pages.errors(pages))


class _Work:
    """Pages on the way: messages of those that are done, and what the receiver will read."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self._messages: list[bytes | None] = [None] * len(pages)
        self._decoded: list[tuple[Tensor, Pages, Errors]] = []

    def open(self) -> Tensor:
        """Which pages have no message yet, long `[m]`."""
        return torch.tensor([i for i, message in enumerate(self._messages) if message is None], dtype=torch.long)

    def keep(self, index: Tensor, chosen: Tensor, messages: Sequence[bytes], decoded: Pages, errors: Errors) -> None:
        """Of the pages `index [m]` those `chosen`, bool `[m]`, are done."""
        if not chosen.any():
            return
        for number, at in zip(index[chosen].tolist(), chosen.nonzero()[:, 0].tolist(), strict=True):
            self._messages[number] = messages[at]
        if not chosen.all():
            decoded, errors = decoded.take(chosen), Errors(*(error[chosen] for error in errors))
        self._decoded.append((index[chosen], decoded, errors))

    def done(self) -> Encoded:
        """All pages, every one of which was kept once."""
        messages = [message for message in self._messages if message is not None]
        assert len(messages) == len(self.pages)
        if len(self._decoded) == 1:
            ((_, decoded, errors),) = self._decoded
            return Encoded(messages, decoded, errors)
        place = torch.cat([index for index, _, _ in self._decoded]).argsort()
        joined = _joined([Encoded([], decoded, errors) for _, decoded, errors in self._decoded])
        return Encoded(messages, joined.decoded.take(place), Errors(*(error[place] for error in joined.errors)))


def _joined(parts: Sequence[Encoded]) -> Encoded:
    errors = Errors(*(torch.cat(error) for error in zip(*(part.errors for part in parts), strict=True)))
    messages = [message for part in parts for message in part.messages]
    return Encoded(messages, Pages.joined([part.decoded for part in parts]), errors)
