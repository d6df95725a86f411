"""Hashes of all windows of a text in O(n), and the windows that are resident, by hash."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from jointkv.core.reuse import Integers

Hashes = NDArray[np.uint64]

GONE = -1
"""In the place of a window that was dropped."""

MOST_WAITING = 1024
"""New windows that are not sorted in before somebody looks for them."""


class RollingHash:
    """Hashes of all windows of `size` tokens: a polynomial in an odd base, modulo 2^64, of mixed tokens.

    Base and mixing are drawn anew, so that nobody can choose texts that collide.

    Args:
        size: tokens of a window.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        draw = random.SystemRandom().getrandbits
        self._salt, self._base = np.uint64(draw(64)), draw(64) | 1
        self._powers = self._inverse = np.ones(1, np.uint64)

    def __call__(self, tokens: Integers) -> Hashes:
        """Of the windows of `tokens [n]`, uint64 `[n - size + 1]`."""
        count = len(tokens) - self.size + 1
        if count < 1:
            return np.zeros(0, np.uint64)
        sums = self._sums(tokens)
        return _mixed((sums[self.size :] - sums[:count]) * self._inverse[:count])

    def beginnings(self, tokens: Integers) -> Hashes:
        """Of the first 0, 1, ..., n of `tokens [n]`, uint64 `[n + 1]`."""
        return _mixed(self._sums(tokens))

    def _sums(self, tokens: Integers) -> Hashes:
        self._prepare(len(tokens))
        sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(_mixed(tokens.astype(np.uint64) ^ self._salt) * self._powers[: len(tokens)], out=sums[1:])
        return sums

    def _prepare(self, length: int) -> None:
        if len(self._powers) < length:
            length = 1 << (length - 1).bit_length()
            inverse = pow(self._base, -1, 2**64)
            self._powers, self._inverse = (_powers(base, length) for base in (self._base, inverse))


def _powers(base: int, count: int) -> Hashes:
    steps = np.full(count, base, np.uint64)
    steps[0] = 1
    return np.multiply.accumulate(steps)


def _mixed(numbers: Hashes) -> Hashes:
    """Every bit of each number depends on all (the finaliser of SplitMix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class WindowTable:
    """Windows by hash: sorted, with a filter before, so that a prompt's many strangers cost one look each.

    Windows are numbers. Dropped ones stay in their places, behind all others with their hash, until they are half, or
    new ones come.
    """

    def __init__(self) -> None:
        self._hashes, self._windows = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._new: list[tuple[Hashes, Integers]] = []
        self._filter, self._bits = np.zeros(2, bool), np.uint64(63)
        self._dropped = self._waiting = 0

    def __len__(self) -> int:
        """Windows that are held, dropped ones included."""
        return len(self._hashes) + self._waiting

    def add(self, hashes: Hashes, windows: Integers) -> None:
        """More `windows [n]` with these `hashes [n]`."""
        self._new.append((hashes, windows))
        self._waiting += len(hashes)
        if self._waiting > MOST_WAITING + len(self._hashes) // 8:
            self._sort()

    def drop(self, hashes: Hashes, windows: Integers) -> None:
        """These `windows [n]` are no longer there."""
        for hash_, window in zip(hashes, windows, strict=True):
            begin, end = (int(np.searchsorted(self._hashes, hash_, side)) for side in ("left", "right"))
            (place,) = np.nonzero(self._windows[begin:end] == window)
            if len(place):
                at = begin + int(place[0])
                self._windows[at : end - 1] = self._windows[at + 1 : end].copy()
                self._windows[end - 1] = GONE
                self._dropped += 1
                continue
            for _, new in self._new:
                new[new == window] = GONE
        if self._dropped > len(self._hashes) // 2:
            self._clean()

    def find(self, hashes: Hashes, most: int) -> tuple[Integers, Integers]:
        """Indices of `hashes [n]` that are there, and windows that have them, at most `most` each, the earliest."""
        self._sort()
        maybe = np.flatnonzero(self._filter[hashes >> self._bits])
        begin = np.searchsorted(self._hashes, hashes[maybe], "left")
        end = np.searchsorted(self._hashes, hashes[maybe], "right")
        count = np.minimum(end - begin, most)
        where = np.repeat(begin - np.cumsum(count) + count, count) + np.arange(int(count.sum()))
        found, windows = np.repeat(maybe, count), self._windows[where]
        there = windows != GONE
        return found[there], windows[there]

    def _sort(self) -> None:
        if not self._new:
            return
        hashes, windows = (np.concatenate(parts) for parts in zip(*self._new, strict=True))
        self._new, self._waiting = [], 0
        if self._dropped:  # new ones would come behind them, where nobody looks
            self._clean()
        hashes, windows = hashes[windows != GONE], windows[windows != GONE]
        order = np.argsort(hashes, kind="stable")
        # Of equal ones those that came last are last.
        place = np.searchsorted(self._hashes, hashes[order], "right")
        self._hashes = np.insert(self._hashes, place, hashes[order])
        self._windows = np.insert(self._windows, place, windows[order])
        bits = max(10, (16 * len(self._hashes)).bit_length())
        if np.uint64(64 - bits) != self._bits:
            self._bits, self._filter = np.uint64(64 - bits), np.zeros(1 << bits, bool)
            hashes = self._hashes
        self._filter[hashes >> self._bits] = True

    def _clean(self) -> None:
        kept = self._windows != GONE
        self._hashes, self._windows, self._dropped = self._hashes[kept], self._windows[kept], 0
