"""Resident pages: where they are found, whose they are, what is known of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jointkv.core.evidence import Evidence, Known
from jointkv.core.moved_text import MovedText
from jointkv.core.reuse import Found, Integers
from jointkv.errors import IntegrityError
from jointkv.fusion.content_index import ContentIndex
from jointkv.fusion.signature_index import SignatureIndex
from jointkv.fusion.token_index import Bucket, TokenIndex, places
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest

NOBODY = -1

MOST_PREEMPTIONS = 1 << 20
"""Of a request at the most: what it computes again is another source."""

FILLED = 1 << 50
"""Numbers from here on are no requests': of what was written from pages at other positions each part is a source."""


class Residents:
    """Pages that may serve others, with the evidence of earlier comparisons. A page leaves before it is written.

    Args:
        pages: of the pool.
        block_size: tokens per page.
        reuses: whether more than the index is kept, for reuse.
        signature_size: numbers of a signature.
        moved: whether text is also found at other positions. Sources are pages whose contexts are exact, and those
            that were written from them.

    Attributes:
        index: finds pages by bucket.
        signatures: finds those of them that were signed by what they hold.
        source: number of the request that computed the page, int64 `[pages]`.
        exact: whether everything before its block was computed or an exact hit, bool `[pages]`.
        evidence: what witnesses say of each page.
        evidence_moved: the same, of witnesses at other positions.
        offers: how often anything was offered so far, see `unchanged`.
    """

    def __init__(
        self, pages: int, block_size: int, reuses: bool = True, signature_size: int = 0, moved: bool = False
    ) -> None:
        self.index = TokenIndex()
        self.signatures = SignatureIndex(signature_size)
        self._reuses = reuses
        self.source = np.full(pages, NOBODY, np.int64)
        self.exact = np.zeros(pages, bool)
        self.evidence, self.evidence_moved = Evidence(pages), Evidence(pages)
        self.offers = 0
        self._content = ContentIndex(block_size) if moved else None
        self._filled = FILLED
        self._offered = np.zeros(pages, np.int64)
        self._slot, self._context = np.zeros(pages, np.int64), np.zeros(pages, np.int64)
        self._tokens = np.zeros((pages, block_size), np.int32)

    def __contains__(self, page: int) -> bool:
        return page in self.index

    def add(self, tracked: TrackedRequest, slot: int, page: int, buckets: tuple[Bucket, ...]) -> None:
        """Offer `page`, which holds what `tracked` has computed at `slot`."""
        self.index.add(buckets, page)
        if not self._reuses:
            return
        self.offers += 1
        self.source[page], self._slot[page], self._offered[page] = tracked.number, slot, self.offers
        self.exact[page], self._context[page] = tracked.is_exact(slot), tracked.contexts(slot, slot + 1)[0]
        self.evidence.start(np.array([page]), tracked.standing(slot, slot + 1))
        self._tokens[page] = tracked.tokens(slot, slot + 1)[0]
        if self._content is not None and self.exact[page]:
            self.evidence_moved.start(np.array([page]), tracked.standing(slot, slot + 1))
            source = tracked.number * MOST_PREEMPTIONS + tracked.epoch
            tokens = tracked.tokens(slot, slot + 1).astype(np.int64)
            self._content.add(tracked.isolation, tokens, np.array([slot]), np.array([page]), source)

    def add_filled(
        self, tracked: TrackedRequest, text: MovedText, slots: Integers, numbers: Integers, pages: Integers
    ) -> None:
        """Offer `pages [n]`, which will hold the blocks `slots [n]` of `tracked`, as `numbers [n]` of `text` say.

        Whoever reads them keeps the text resident, when its sources are handed out. Evidence goes with it.
        """
        assert self._content is not None
        standing, covered = tracked.standing(0, int(slots.max()) + 1)[slots], text.covered(self.evidence_moved, numbers)
        known = text.known(self.evidence_moved, self.evidence, numbers, standing)
        self.evidence_moved.inherit(pages, known, covered)
        self.evidence.start(pages, covered)
        self._filled += 1
        self.offers += 1
        self.source[pages], self._slot[pages], self.exact[pages] = self._filled, slots, False
        self._offered[pages] = self.offers
        tokens = tracked.tokens(0, int(slots.max()) + 1)[slots].astype(np.int64)
        self._content.add(tracked.isolation, tokens, slots, pages, self._filled)

    def testify(self, tracked: TrackedRequest, slots: Integers, pages: Integers, ratios: NDArray[np.float32]) -> None:
        """The blocks `slots [n]` of `tracked` are that far from the resident `pages [n]`: error over bound, `[n]`.

        Not those that stand behind the same text: that they are near says nothing of other text.
        """
        last = int(slots.max()) + 1 if len(slots) else 0
        other = self._context[pages] != tracked.contexts(0, last)[slots]
        pages, ratios, seen = pages[other], ratios[other], tracked.standing(0, last)[slots[other]]
        while len(pages):  # one request may have compared a page twice, and evidence takes a page once at a time
            first = np.unique(pages, return_index=True)[1]
            self.evidence.add(pages[first], ratios[first], seen[first])
            pages, ratios, seen = (np.delete(column, first) for column in (pages, ratios, seen))

    def check_integrity(self) -> None:
        """Raises IntegrityError when an index or the evidence is inconsistent."""
        self.index.check_integrity()
        self.signatures.check_integrity()
        if not all(page in self.index for page in self.signatures):
            raise IntegrityError("a page has a signature and is not resident")
        if self._content is not None:
            self._content.check_integrity()
            self.evidence_moved.check_integrity()
            if sum(page in self._content for page in np.flatnonzero(self.source != NOBODY).tolist()) != len(
                self._content
            ):
                raise IntegrityError("a page is found at other positions and is not resident")
        self.evidence.check_integrity()

    def known(self, tracked: TrackedRequest, slots: Integers, pages: Integers) -> Known:
        """What evidence says of `pages [n]` for the blocks `slots [n]` of `tracked`."""
        last = int(slots.max()) + 1 if len(slots) else 0
        return self.evidence.known(pages, tracked.standing(0, last)[slots])

    def find(self, tracked: TrackedRequest, first: int, end: int, group: int) -> Found:
        """Where blocks `first` to `end` of `tracked` are resident, compared token by token, not by hash alone."""
        at = places(tracked.hashes(end)[first:end], np.arange(first, end))
        page = self.index.pages((tracked.isolation, group), at)
        slot = self._slot[page]
        if len(page):
            tokens = tracked.tokens(first, end).take(slot - first, axis=0, mode="clip")
            differ = np.flatnonzero(self._tokens.take(page, axis=0) != tokens) // tokens.shape[1]
            clash = (slot < first) | (slot >= end)
            clash[differ] = True
            if clash.any():  # of hashes; next to never
                slot, page = slot[~clash], page[~clash]
        return Found(slot, page, self.source[page], self.exact[page])

    def find_moved(self, tracked: TrackedRequest, first: int, end: int, least: int) -> MovedText | None:
        """What of the blocks `first` to `end` of `tracked` is resident at other positions, in stretches of `least`."""
        if self._content is None or end <= first:
            return None
        tokens, size = tracked.tokens(0, end).ravel().astype(np.int64), tracked.block_size
        found = self._content.find(tracked.isolation, tokens, least * size)
        # Text that stands where it stood is found by the other index, but for what was written from elsewhere.
        text = MovedText.of([run for run in found if run.shift or run.source > FILLED], first, end, size)
        return text if len(text) else None

    def unchanged(self, pages: Integers, offers: int) -> NDArray[np.bool_]:
        """Which of `pages [n]` are resident and hold what they held when so many `offers` had been made: bool `[n]`.

        Not what the same request has written there again: it may have been computed behind other pages by now.
        """
        found: NDArray[np.bool_] = (self.source[pages] != NOBODY) & (self._offered[pages] <= offers)
        return found

    def remove(self, page: int) -> None:
        """`page` is about to be written, or given away."""
        self.index.remove(page)
        if self._content is not None:
            self._content.remove(page)
        self.signatures.remove(page)
        self.source[page] = NOBODY

    def clear(self) -> None:
        """Forget every page; an index may be what is broken."""
        self.index = TokenIndex()
        self.signatures = SignatureIndex(self.signatures.size)
        if self._content is not None:
            self._content = ContentIndex(self._content.block_size)
        self.source[:] = NOBODY
