"""What is known of resident pages from earlier comparisons, and which tokens of a block echo what stands before.

A block depends on the header before a text most of all through tokens that stand there too: a name, a number. Such a
token is an *echo*, at its first place in the text; further on the text's own token is nearer. A page is known for the
echoes under which it was compared, not for those that were never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jointkv.errors import IntegrityError, LayoutError

Echoes = NDArray[np.uint64]
"""One bit per token of a block, by its place modulo 64: whether it is an echo."""

PLACES = 64


def echoes(tokens: NDArray[np.int64], before: NDArray[np.int64], block_size: int) -> Echoes:
    """Which tokens of each block also stand in `before` and nowhere earlier in `tokens`, `[blocks]`; in linear time.

    Args:
        tokens: ids of whole blocks, `[blocks * block_size]`.
        before: ids of what stands before them, of any length.

    Raises:
        LayoutError: `tokens` are no whole blocks, or an id is negative.
    """
    if len(tokens) % block_size:
        raise LayoutError(f"{len(tokens)} tokens are no whole blocks of {block_size}")
    if not len(tokens) or not len(before):
        return np.zeros(len(tokens) // block_size, np.uint64)
    if min(tokens.min(), before.min()) < 0:
        raise LayoutError("a token id is negative")
    ids = int(max(tokens.max(), before.max())) + 1
    stands = np.zeros(ids, bool)
    stands[before] = True
    places, first = np.arange(len(tokens)), np.zeros(ids, np.int64)
    # Of several values for one index the last is kept.
    first[tokens[::-1]] = places[::-1]
    echo = stands[tokens] & (first[tokens] == places)
    return _bits(echo.reshape(-1, block_size))


def standing(tokens: NDArray[np.integer], block_size: int) -> Echoes:
    """Which tokens of each block also stand before that block, `[blocks]`: in linear time.

    For the same text behind another context the bits that are set here and not there are its echoes of what differs: of
    what stands in the text itself, both have the bits. So neither need know where the text begins.

    Args:
        tokens: ids of whole blocks, from a request's first token on, `[blocks * block_size]`.

    Raises:
        LayoutError: `tokens` are no whole blocks, or an id is negative.
    """
    if len(tokens) % block_size:
        raise LayoutError(f"{len(tokens)} tokens are no whole blocks of {block_size}")
    if not len(tokens):
        return np.zeros(0, np.uint64)
    if tokens.min() < 0:
        raise LayoutError("a token id is negative")
    places, first = np.arange(len(tokens)), np.zeros(int(tokens.max()) + 1, np.int64)
    # Of several values for one index the last is kept.
    first[tokens[::-1]] = places[::-1]
    return _bits((first[tokens] < places // block_size * block_size).reshape(-1, block_size))


def _bits(marked: NDArray[np.bool_]) -> Echoes:
    """One bit per column of `marked [blocks, block_size]`."""
    bit = np.uint64(1) << (np.arange(marked.shape[1], dtype=np.uint64) % np.uint64(PLACES))
    return np.bitwise_or.reduce(np.where(marked, bit, np.uint64(0)), axis=1)


@dataclass(frozen=True, eq=False)
class Known:
    """What evidence says of `n` pages for one request each.

    Attributes:
        count: witnesses within the bounds, int64 `[n]`.
        worst: largest ratio of all witnesses that tell, float32 `[n]`.
        new: whether the request has echoes that no witness covers, bool `[n]`.
    """

    count: NDArray[np.int64]
    worst: NDArray[np.float32]
    new: NDArray[np.bool_]

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Known:
        """Of some of the pages: bool `[n]`, or indices."""
        return Known(self.count[chosen], self.worst[chosen], self.new[chosen])


class Evidence:
    """Witnesses of pages: how many were within the bounds, the worst of those that tell, and echoes they covered.

    A comparison beyond the bounds whose echoes no earlier one covered is explained by them: what it says is about its
    own echoes, which stay uncovered, and the page serves requests that lack them. Any other one tells of the page.

    Args:
        pages: number of pages of the pool.
    """

    def __init__(self, pages: int) -> None:
        self.count = np.zeros(pages, np.int64)
        self.worst = np.zeros(pages, np.float32)
        self.covered: Echoes = np.zeros(pages, np.uint64)

    def start(self, pages: NDArray[np.int64], own: Echoes) -> None:
        """Nothing is known yet of `pages [n]`, computed where their tokens have the echoes `own [n]`."""
        self.count[pages] = 0
        self.worst[pages] = 0.0
        self.covered[pages] = own

    def inherit(self, pages: NDArray[np.int64], known: Known, covered: Echoes) -> None:
        """What `pages [n]` hold comes from pages of which so much is `known [n]`, and these echoes `covered [n]`."""
        self.count[pages], self.worst[pages], self.covered[pages] = known.count, known.worst, covered

    def add(self, pages: NDArray[np.int64], ratio: NDArray[np.float32], seen: Echoes) -> None:
        """Another computed block was compared with each of `pages [n]`, no page twice.

        Args:
            ratio: error over bound, `[n]`; not a number counts as beyond.
            seen: echoes of the other block where it was computed, `[n]`.
        """
        within = ratio <= 1.0
        tells = within | ~self.new(pages, seen)
        beyond = np.where(np.isnan(ratio), np.float32(np.inf), ratio)
        self.count[pages] += within
        self.worst[pages] = np.where(tells, np.maximum(self.worst[pages], beyond), self.worst[pages])
        self.covered[pages] |= np.where(within, seen, np.uint64(0))

    def new(self, pages: NDArray[np.int64], seen: Echoes) -> NDArray[np.bool_]:
        """Whether `seen [n]` has echoes under which the page was never found within the bounds, bool `[n]`."""
        return np.asarray(seen & ~self.covered[pages]) != 0

    def known(self, pages: NDArray[np.int64], seen: Echoes) -> Known:
        """What is known of `pages [n]` for blocks with the echoes `seen [n]`."""
        return Known(self.count[pages], self.worst[pages], self.new(pages, seen))

    def grow(self, pages: int) -> None:
        """Room for `pages`, if there is less."""
        more = max(pages - len(self.count), 0)
        self.count, self.worst = np.pad(self.count, (0, more)), np.pad(self.worst, (0, more))
        self.covered = np.pad(self.covered, (0, more))

    def forget_witnesses(self) -> None:
        """Begin anew under other bounds; the echoes that were covered stay so."""
        self.count[:], self.worst[:] = 0, 0.0

    def check_integrity(self) -> None:
        """Raises `IntegrityError` for counts or ratios that cannot be."""
        if (self.count < 0).any() or not (self.worst >= 0).all():
            raise IntegrityError("a page has a negative number of witnesses, or a worst ratio that is none")
