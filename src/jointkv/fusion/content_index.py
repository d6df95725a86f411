"""Search by content: where in resident pages does text of a prompt stand, at whatever position?

Resident text is cut into windows of half a block. A rolling hash gives every window of a prompt, at all its offsets, in
O(n); those that are resident are verified by their tokens, put together to runs, and extended token by token.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jointkv.core.moved import MovedRun
from jointkv.core.reuse import Integers
from jointkv.errors import IntegrityError, InvalidPolicy
from jointkv.fusion.rolling_hash import RollingHash, WindowTable

SOURCES = 4
"""Pages with the same window that are followed, those that have been resident longest: most is known of them."""

NOWHERE = -1


@dataclass
class _Text:
    """Resident pages of one source.

    Attributes:
        pages: by slot, `NOWHERE` where none is resident.
    """

    pages: Integers
    held: int = 0


class _Owner:
    """What is resident under one isolation key.

    Args:
        number: no other owner has had it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.table = WindowTable()
        self.texts: dict[int, _Text] = {}
        self.pages = 0


class ContentIndex:
    """Resident text by content, wherever it stands; the tokens decide, hashes only propose.

    A page costs 8 bytes per token, 40 for each of its two windows and some 30 for its place.

    Args:
        block_size: tokens per page, even: windows are halves of a page.
    """

    def __init__(self, block_size: int) -> None:
        if block_size < 2 or block_size % 2:
            raise InvalidPolicy(f"block_size: text that moved is found by halves of blocks, and {block_size} has none")
        self.block_size, self._half = block_size, block_size // 2
        self._rolling = RollingHash(self._half)
        self._owners: dict[Hashable, _Owner] = {}
        self._owner_of: dict[int, Hashable] = {}
        self._tokens = np.zeros((0, block_size), np.int64)
        self._source, self._slot = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._number, self._hashes = np.zeros(0, np.int64), np.zeros((0, 2), np.uint64)
        self._owners_so_far = 0

    def __len__(self) -> int:
        """Resident pages."""
        return len(self._owner_of)

    def __contains__(self, page: int) -> bool:
        return page in self._owner_of

    def add(self, owner: Hashable, tokens: Integers, slots: Integers, pages: Integers, source: int) -> None:
        """Make `pages [n]` with these `tokens [n, block_size]` resident: blocks `slots [n]` of the request `source`.

        Raises:
            IntegrityError: one of them is resident already.
        """
        if not len(pages):
            return
        numbers = pages.tolist()
        if len(set(numbers)) < len(numbers) or not self._owner_of.keys().isdisjoint(numbers):
            raise IntegrityError("a page is added to the index twice")
        self._reach(max(numbers))
        self._tokens[pages] = tokens
        self._source[pages], self._slot[pages] = source, slots
        self._owner_of.update(dict.fromkeys(numbers, owner))
        held = self._owners.get(owner) or self._new_owner(owner)
        self._number[pages] = held.number
        self._place(held, slots, pages, source)
        starts = np.arange(len(pages))[:, None] * self.block_size + np.array([0, self._half])
        self._hashes[pages] = self._rolling(tokens.reshape(-1))[starts]
        held.table.add(self._hashes[pages].reshape(-1), _windows(pages))
        held.pages += len(numbers)

    def remove(self, page: int) -> None:
        """Forget `page`, for example because it is about to be written. Unknown pages are passed over."""
        owner = self._owner_of.pop(page, None)
        if owner is None:
            return
        held, source = self._owners[owner], int(self._source[page])
        text = held.texts[source]
        text.pages[self._slot[page]] = NOWHERE
        text.held -= 1
        if not text.held:
            del held.texts[source]
        held.pages -= 1
        self._number[page] = NOWHERE
        if held.pages:
            held.table.drop(self._hashes[page], _windows(np.array([page])))
        else:
            del self._owners[owner]

    def clear(self) -> None:
        """Forget everything."""
        self._owners.clear()
        self._owner_of.clear()
        self._number[:] = NOWHERE

    def find(self, owner: Hashable, tokens: Integers, least: int) -> list[MovedRun]:
        """Runs of at least `least` of the prompt's `tokens [n]`, none of which overlap, in their order.

        The longest first, of equal ones the oldest source: of what a longer one covers, a shorter one has only the
        rest. Runs that contain no window of a resident page as a whole are not found; one of `block_size - 1` tokens or
        more always contains one.
        """
        held = self._owners.get(owner)
        if held is None:
            return []
        offset, window = held.table.find(self._rolling(tokens), SOURCES)
        page, part = window // 2, window % 2 * self._half
        equal = self._equal(tokens, offset, page, part)
        return self._without_overlap(self._runs(held, tokens, offset[equal], page[equal], part[equal], least), least)

    def check_integrity(self) -> None:
        """Raises IntegrityError when pages, sources and owners disagree."""
        held = 0
        for owner, room in self._owners.items():
            for source, text in room.texts.items():
                (slots,) = np.nonzero(text.pages != NOWHERE)
                pages = text.pages[slots]
                if len(slots) != text.held or not (self._slot[pages] == slots).all():
                    raise IntegrityError(f"source {source} has pages that are elsewhere")
                if any(self._owner_of.get(page) != owner for page in pages.tolist()):
                    raise IntegrityError("a page is under another owner")
                held += len(slots)
        (numbered,) = np.nonzero(self._number != NOWHERE)
        if set(numbered.tolist()) != self._owner_of.keys():
            raise IntegrityError("pages are numbered that are not resident, or resident ones are not")
        if held != len(self._owner_of) or any(not room.pages for room in self._owners.values()):
            raise IntegrityError("pages are lost, or an owner without any was kept")

    def _reach(self, page: int) -> None:
        if page < len(self._source):
            return
        more = max(page + 1, 2 * len(self._source)) - len(self._source)
        self._tokens = np.concatenate((self._tokens, np.zeros((more, self.block_size), np.int64)))
        self._hashes = np.concatenate((self._hashes, np.zeros((more, 2), np.uint64)))
        self._source, self._slot, self._number = (
            np.concatenate((old, np.full(more, NOWHERE, np.int64))) for old in (self._source, self._slot, self._number)
        )

    def _new_owner(self, owner: Hashable) -> _Owner:
        self._owners_so_far += 1
        self._owners[owner] = _Owner(self._owners_so_far)
        return self._owners[owner]

    def _place(self, held: _Owner, slots: Integers, pages: Integers, source: int) -> None:
        text = held.texts.setdefault(source, _Text(np.zeros(0, np.int64)))
        missing = int(slots.max()) + 1 - len(text.pages)
        if missing > 0:
            text.pages = np.concatenate((text.pages, np.full(missing, NOWHERE, np.int64)))
        text.pages[slots] = pages
        text.held += len(pages)

    def _equal(self, tokens: Integers, offset: Integers, page: Integers, part: Integers) -> NDArray[np.bool_]:
        """Whether windows of the prompt are those of pages: tokens compared, bool `[n]`."""
        if not len(offset):
            return np.zeros(0, bool)
        theirs = self._tokens.reshape(-1, 2, self._half)[page, part // self._half]
        ours = np.lib.stride_tricks.sliding_window_view(tokens, self._half)[offset]
        return (ours == theirs).all(1)

    def _runs(
        self, held: _Owner, tokens: Integers, offset: Integers, page: Integers, part: Integers, least: int
    ) -> list[MovedRun]:
        """Windows that follow each other in one source, put together and extended; none that is too short all the same.

        Texts that resemble themselves, such as lists of tools, have hundreds of those.
        """
        source, place = self._source[page], self._slot[page] * self.block_size + part
        shift = offset - place
        order = np.lexsort((place, shift, source))
        source, place, shift = source[order], place[order], shift[order]
        new = (np.diff(source, prepend=NOWHERE) != 0) | (np.diff(shift, prepend=0) != 0)
        new |= np.diff(place, prepend=NOWHERE) > self._half
        starts = np.flatnonzero(new)
        ends = np.append(starts[1:], len(source))[: len(starts)] - 1
        long = place[ends] + 3 * self._half - place[starts] >= least  # at each end it grows by a window at most
        starts, ends = starts[long], ends[long]
        found = np.stack((source[starts], shift[starts], place[starts], place[ends])).T.tolist()
        return [
            self._extended(held.texts[number].pages, tokens, by, first, last + self._half, number)
            for number, by, first, last in found
        ]

    def _extended(self, pages: Integers, tokens: Integers, shift: int, first: int, end: int, source: int) -> MovedRun:
        """The run from token `first` to `end` of the source, and what is equal before and behind it, not a window."""
        size = self.block_size
        before, behind = pages[(first - 1) // size] if first else NOWHERE, NOWHERE
        if end // size < len(pages):
            behind = pages[end // size]
        if before != NOWHERE:
            count = min(self._half, first % size or size, first + shift)
            theirs = self._tokens[before][(first - 1) % size + 1 - count : (first - 1) % size + 1]
            differ = np.flatnonzero(theirs != tokens[first + shift - count : first + shift])
            first -= count - (int(differ[-1]) + 1 if len(differ) else 0)
        if behind != NOWHERE:
            count = min(self._half, size - end % size, len(tokens) - end - shift)
            theirs = self._tokens[behind][end % size : end % size + count]
            differ = np.flatnonzero(theirs != tokens[end + shift : end + shift + count])
            end += int(differ[0]) if len(differ) else count
        used = pages[first // size : (end - 1) // size + 1]
        return MovedRun(first + shift, end - first, source, first % size, used.copy(), shift)

    def _without_overlap(self, runs: list[MovedRun], least: int) -> list[MovedRun]:
        """The longest of them, then what is left of the others."""
        heap = [(-run.tokens, run.source, number, run) for number, run in enumerate(runs) if run.tokens >= least]
        heapq.heapify(heap)
        number, taken, chosen = len(heap), _Taken(), list[MovedRun]()
        while heap:
            *_, run = heapq.heappop(heap)
            free = taken.free(run.first, run.end)
            if free == [(run.first, run.end)]:
                taken.add(run.first, run.end)
                chosen.append(run)
                continue
            for start, end in free:
                part = run.within(start, end, self.block_size) if end - start >= least else None
                if part is not None:
                    number += 1
                    heapq.heappush(heap, (-part.tokens, part.source, len(runs) + number, part))
        return sorted(chosen, key=lambda run: run.first)


class _Taken:
    """Stretches of a prompt that runs have been chosen for."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        place = int(np.searchsorted(self._starts, start))
        self._starts.insert(place, start)
        self._ends.insert(place, end)

    def free(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of `start` to `end` nothing was chosen for."""
        left = []
        place = int(np.searchsorted(self._ends, start, "right"))
        while place < len(self._starts) and self._starts[place] < end:
            if self._starts[place] > start:
                left.append((start, self._starts[place]))
            start = self._ends[place]
            place += 1
        if start < end:
            left.append((start, end))
        return left


def _windows(pages: Integers) -> Integers:
    """Numbers of the halves of `pages [n]`, `[2 n]`."""
    windows: Integers = (pages[:, None] * 2 + np.array([0, 1])).reshape(-1)
    return windows
