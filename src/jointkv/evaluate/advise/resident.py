"""A prefix cache without a model: which blocks of each request are resident when it comes, and by which kind of reuse.

Blocks stay until the pool is full; then those go first that were used longest ago, of one request the last block first.
So does vLLM's prefix cache; requests that run at the same time are not told apart from those one after another.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from jointkv.core.moved import MovedRun
from jointkv.core.reuse import Integers, stretches
from jointkv.errors import IntegrityError
from jointkv.fusion.content_index import ContentIndex
from jointkv.fusion.rolling_hash import RollingHash
from jointkv.policy.reuse import ReuseRule

_ODD = np.uint64(0xD6E8FEB86659FD93)
UNLIMITED = 1 << 62
SLACK = 16
"""The pool may overflow by one part in so many before blocks leave it, so that they leave together."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What was resident of a request when it came.

    Attributes:
        tokens: of its prompt.
        exact_tokens: in blocks before which everything is equal too.
        same_tokens: in blocks that are resident at their position behind another text; the first of each stretch is
            computed and compared, and does not count.
        moved_tokens: in further blocks whose text is resident at another position, likewise.
        stretches: of blocks that count as `same_tokens`.
        runs: stretches of the prompt that stand in one earlier request, at whatever position, with what is exact.
    """

    tokens: int
    exact_tokens: int
    same_tokens: int
    moved_tokens: int
    stretches: int
    runs: list[MovedRun]


class Resident:
    """Requests one after another, and the blocks that are left of them.

    Args:
        block_size: tokens per block; where it is odd, text that moved is not found.
        pool_tokens: that stay resident; None: all.
        least_blocks: of a stretch that is reused, with its first block, which is computed.

    Attributes:
        sources: prompts of earlier requests of which something is left, by number, int32 `[n]`.
        least: the same as `least_blocks`, in tokens.
    """

    def __init__(
        self, block_size: int, pool_tokens: int | None = None, least_blocks: int = ReuseRule().least + 1
    ) -> None:
        self._size, self._least_blocks = block_size, least_blocks
        self._most = UNLIMITED if pool_tokens is None else max(1, pool_tokens // block_size)
        self._content = None if block_size % 2 else ContentIndex(block_size)
        self._prefix, self._block = RollingHash(1), RollingHash(block_size)
        self._owners: dict[Hashable, int] = {}
        self._blocks: OrderedDict[int, int] = OrderedDict()
        self._places: dict[int, tuple[int, int]] = {}
        self._copies: dict[int, int] = {}
        self._left_of: Counter[int] = Counter()
        self._free: list[int] = []
        self._pages = self._requests = 0
        self.sources: dict[int, np.ndarray] = {}
        self.least = least_blocks * block_size

    @property
    def finds_moved(self) -> bool:
        """Whether text is also found at other positions."""
        return self._content is not None

    def request(self, owner: Hashable, tokens: Integers) -> Seen:
        """The next request of `owner`, with `tokens [n]`: what was there, and from then on it is there too."""
        size = self._size
        blocks, usable = len(tokens) // size, max(0, len(tokens) - 1) // size
        with np.errstate(over="ignore"):  # hashes are numbers of 64 bits; of a single one numpy says so
            mark = np.uint64(self._owners.setdefault(owner, len(self._owners))) * _ODD
        keys = (self._prefix.beginnings(tokens)[size::size] ^ mark).tolist()
        slots = np.arange(blocks, dtype=np.uint64)
        places = ((self._block(tokens)[::size][:blocks] ^ mark) + slots * _ODD).tolist()
        exact = next((slot for slot, key in enumerate(keys[:usable]) if key not in self._blocks), usable)
        resident = np.array([slot >= exact and places[slot] in self._places for slot in range(usable)], bool)
        found = [stretch for stretch in stretches(resident) if len(stretch) >= self._least_blocks]
        same = {slot for stretch in found for slot in stretch[1:]}
        runs = [] if self._content is None else self._content.find(owner, tokens[:-1], self.least)
        moved = {int(slot) for run in runs if run.shift for slot in run.fills(size).slots[1:] if slot >= exact} - same
        self._add(owner, tokens, keys, places)
        return Seen(len(tokens), exact * size, len(same) * size, len(moved) * size, len(found), runs)

    def check_integrity(self) -> None:
        """Raises IntegrityError when blocks, places, pages and sources disagree."""
        if Counter(self._blocks.values()) != self._copies or self._copies.keys() != self._places.keys():
            raise IntegrityError("the counts of equal blocks are wrong")
        if Counter(source for _, source in self._places.values()) != self._left_of:
            raise IntegrityError("places and what is left of sources disagree")
        if self._content is not None:
            self._content.check_integrity()
            if len(self._content) != len(self._places):
                raise IntegrityError("what is found at other positions is not what is resident")
        if self._left_of.keys() != self.sources.keys():
            raise IntegrityError("a source without blocks was kept, or one with blocks is gone")

    def _add(self, owner: Hashable, tokens: Integers, keys: list[int], places: list[int]) -> None:
        source, slots = self._requests, list[int]()
        self._requests += 1
        blocks, copies = self._blocks, self._copies
        for slot in range(len(keys) - 1, -1, -1):  # the last one leaves first
            key, place = keys[slot], places[slot]
            if key in blocks:
                blocks.move_to_end(key)
                continue
            blocks[key] = place
            known = copies.get(place, 0)
            copies[place] = known + 1
            if not known:
                slots.append(slot)
        if slots:
            pages = self._take(len(slots))
            self._places.update(zip([places[slot] for slot in slots], zip(pages, repeat(source)), strict=False))
            if self._content is not None:
                chosen = np.array(slots[::-1])
                text = tokens[: len(keys) * self._size].reshape(-1, self._size)[chosen]
                self._content.add(owner, text, chosen, np.array(pages[::-1]), source)
            self.sources[source], self._left_of[source] = tokens.astype(np.int32), len(pages)
        if len(self._blocks) > self._most + self._most // SLACK:
            self._shrink()

    def _take(self, count: int) -> list[int]:
        """Numbers of as many pages, of those that were left first."""
        free = self._free[max(0, len(self._free) - count) :][::-1]
        del self._free[len(self._free) - len(free) :]
        new = range(self._pages, self._pages + count - len(free))
        self._pages += len(new)
        return [*free, *new]

    def _shrink(self) -> None:
        gone = []
        while len(self._blocks) > self._most:
            _, place = self._blocks.popitem(last=False)
            self._copies[place] -= 1
            if not self._copies[place]:
                del self._copies[place]
                page, source = self._places.pop(place)
                gone.append(page)
                self._left_of[source] -= 1
                if not self._left_of[source]:
                    del self._left_of[source], self.sources[source]
        if self._content is not None:
            for page in gone:
                self._content.remove(page)
        self._free += gone
