"""Resident text: which pages hold which tokens, in whose context they were computed, and what is known of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from jointkv.core.evidence import Echoes, Evidence, Known, standing
from jointkv.core.moved import MovedRun
from jointkv.core.reuse import Found, Integers
from jointkv.errors import IntegrityError
from jointkv.fusion.content_index import ContentIndex
from jointkv.fusion.signature import token_hashes
from jointkv.fusion.token_index import contexts

MOST_SOURCES = 8
"""Earlier requests considered for one prompt: those that hold most of it."""

NOBODY = -1


@dataclass(frozen=True)
class Matches:
    """Resident blocks with the tokens, position and isolation key of blocks of a prompt.

    Attributes:
        slot, page, source: int64 `[n]`, see `Found`.
        same_context: bool `[n]`: everything before the block is equal too, so its K and V are.
        exact: pages of the leading slots whose text is resident from the first token on, int64.
        standing: of every block of the prompt, see `core.evidence`.
    """

    slot: Integers
    page: Integers
    source: Integers
    same_context: NDArray[np.bool_]
    exact: Integers
    standing: Echoes

    @property
    def found(self) -> Found:
        """As planning wants it; every resident page was computed behind its own context."""
        order = np.argsort(self.slot, kind="stable")
        return Found(self.slot[order], self.page[order], self.source[order], np.ones(len(order), bool))


class Residents:
    """Full blocks that were computed behind their own true context, by the page that holds them.

    Tokens are compared themselves: nothing measures K and V before they are reused.

    Args:
        block_size: tokens per page.
        moved: whether text is also found at other positions.

    Attributes:
        evidence: what witnesses say of each page.
        evidence_moved: the same, of witnesses at other positions.
    """

    def __init__(self, block_size: int, moved: bool = False) -> None:
        self.block_size = block_size
        self._content = ContentIndex(block_size) if moved else None
        self.evidence, self.evidence_moved = Evidence(0), Evidence(0)
        self._tokens = np.zeros((0, block_size), np.int64)
        self._slot, self._source, self._tenant, self._hash, self._context = (
            np.full(0, NOBODY, np.int64) for _ in range(5)
        )
        self._tenants: dict[Hashable, int] = {}
        self._held: Counter[int] = Counter()
        self._next_tenant = 0

    def __len__(self) -> int:
        return int((self._slot != NOBODY).sum())

    def find(self, tenant: Hashable, tokens: Integers) -> Matches:
        """Where the full blocks of a prompt are resident; of many sources those that hold most of it.

        Args:
            tokens: ids `[n]`.
        """
        blocks = len(tokens) // self.block_size
        number = self._tenants.get(tenant)
        if number is None or not blocks:
            none = np.zeros(0, np.int64)
            return Matches(none, none, none, none.astype(bool), none, np.zeros(blocks, np.uint64))
        rows, hashes, before = self._keys(tokens[: blocks * self.block_size])
        pages = np.flatnonzero((self._tenant == number) & (self._slot < blocks))
        slot = self._slot[pages]
        equal = self._hash[pages] == hashes[slot]
        pages, slot = pages[equal], slot[equal]
        equal = (self._tokens[pages] == rows[slot]).all(1)
        pages, slot = pages[equal], slot[equal]
        source = self._source[pages]
        same = self._context[pages] == before[slot]
        equal_slot, first = np.unique(slot[same], return_index=True)
        unbroken = int((equal_slot == np.arange(len(equal_slot))).sum())
        exact = pages[same][first[:unbroken]]
        kept = _largest(source, MOST_SOURCES)
        return Matches(
            slot[kept], pages[kept], source[kept], same[kept], exact, standing(rows.ravel(), self.block_size)
        )

    def find_moved(self, tenant: Hashable, tokens: Integers, least: int) -> list[MovedRun]:
        """Where stretches of at least `least` blocks of a prompt with these `tokens [n]` are resident, wherever."""
        return [] if self._content is None else self._content.find(tenant, tokens, least * self.block_size)

    def add(self, tenant: Hashable, tokens: Integers, slots: Integers, pages: Integers, source: int) -> None:
        """Make `pages [n]`, which hold the blocks `slots [n]` of a request with `tokens`, resident.

        Those that are already are passed over. Witnesses begin anew.
        """
        if not len(pages):
            return
        self._grow(int(pages.max()) + 1)
        new = self._slot[pages] == NOBODY
        slots, pages = slots[new], pages[new]
        if tenant not in self._tenants:
            self._tenants[tenant], self._next_tenant = self._next_tenant, self._next_tenant + 1
        number = self._tenants[tenant]
        blocks = len(tokens) // self.block_size
        rows, hashes, before = self._keys(tokens[: blocks * self.block_size])
        self._slot[pages], self._source[pages], self._tenant[pages] = slots, source, number
        self._tokens[pages], self._hash[pages], self._context[pages] = rows[slots], hashes[slots], before[slots]
        for evidence in (self.evidence, self.evidence_moved):
            evidence.start(pages, standing(rows.ravel(), self.block_size)[slots])
        self._held[number] += len(pages)
        if self._content is not None:
            self._content.add(tenant, rows[slots], slots, pages, source)
        self._drop_empty(np.array([number]))

    def forget(self, pages: torch.Tensor) -> None:
        """Take `pages [n]` out, because they are free or about to be written; unknown ones are passed over."""
        known = pages.numpy()
        known = known[known < len(self._slot)]
        known = np.unique(known[self._slot[known] != NOBODY])
        if self._content is not None:
            for page in known.tolist():
                self._content.remove(page)
        gone = self._tenant[known]
        self._slot[known] = self._tenant[known] = NOBODY
        self._held.subtract(gone.tolist())
        self._drop_empty(gone)

    def witness(self, matches: Matches, slots: Integers, pages: Integers, ratios: NDArray[np.floating]) -> None:
        """Note how far the blocks `slots [n]` of a prompt, computed behind their own context, were from `pages [n]`."""
        self.evidence.add(pages, ratios.astype(np.float32), matches.standing[slots])

    def known(self, matches: Matches, slots: Integers, pages: Integers) -> Known:
        """What evidence says of `pages [n]` for the blocks `slots [n]` of a prompt."""
        return self.evidence.known(pages, matches.standing[slots])

    def forget_witnesses(self) -> None:
        """Begin anew, because ratios of other bounds say little."""
        for evidence in (self.evidence, self.evidence_moved):
            evidence.forget_witnesses()

    def check_integrity(self) -> None:
        """Raises IntegrityError when the columns, or the counts by isolation key, disagree."""
        resident = self._slot != NOBODY
        if not np.array_equal(resident, self._tenant != NOBODY):
            raise IntegrityError("a resident page without isolation key, or the other way round")
        numbers, held = np.unique(self._tenant[resident], return_counts=True)
        expected = dict(zip(numbers.tolist(), held.tolist(), strict=True))
        if expected != dict(self._held) or set(expected) != set(self._tenants.values()):
            raise IntegrityError("the counts of resident pages by isolation key are wrong")
        if self._content is not None:
            self._content.check_integrity()
            if len(self._content) != int(resident.sum()):
                raise IntegrityError("what is found at other positions is not what is resident")

    def pages(self) -> Integers:
        """All resident pages."""
        return np.flatnonzero(self._slot != NOBODY)

    def _keys(self, tokens: Integers) -> tuple[Integers, Integers, Integers]:
        """Tokens, hashes and hashes of all that comes before, of each block."""
        hashes = token_hashes(torch.from_numpy(tokens), self.block_size).numpy()
        return tokens.reshape(-1, self.block_size), hashes, contexts(hashes)

    def _grow(self, pages: int) -> None:
        extra = pages - len(self._slot)
        if extra <= 0:
            return
        extra = max(extra, len(self._slot))
        for name in ("_slot", "_source", "_tenant", "_hash", "_context"):
            setattr(self, name, np.pad(getattr(self, name), (0, extra), constant_values=NOBODY))
        for evidence in (self.evidence, self.evidence_moved):
            evidence.grow(len(self._slot))
        self._tokens = np.pad(self._tokens, ((0, extra), (0, 0)))

    def _drop_empty(self, numbers: Integers) -> None:
        """Forget isolation keys without a page: there may be as many as users."""
        empty = {number for number in set(numbers.tolist()) if not self._held[number]}
        for number in empty:
            del self._held[number]
        if empty:
            self._tenants = {tenant: number for tenant, number in self._tenants.items() if number not in empty}


def _largest(groups: Integers, count: int) -> NDArray[np.bool_]:
    """Which entries belong to the `count` most frequent groups; of equal ones the latest numbers."""
    numbers, sizes = np.unique(groups, return_counts=True)
    chosen: NDArray[np.bool_] = np.isin(groups, numbers[np.lexsort((numbers, sizes))[-count:]])
    return chosen
