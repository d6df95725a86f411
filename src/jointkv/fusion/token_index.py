"""Online search by equal text: which resident pages hold the same tokens as a newly filled block?"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

from jointkv.errors import IntegrityError

Bucket = tuple[Hashable, int]
"""Owner and place, all that blocks must have in common before they are compared: isolation key and layer group, and
what `places` makes of position and text."""

NONE = array("q")
"""The pages of a bucket that there is not; never written."""

MOST = 64
"""Pages of one place that are looked at. Text that nobody's page may serve leaves a copy for every request, and who
comes next is not to look at all of them."""

POSITION = np.int64(0x1B873593CC9E2D51)
"""An odd number, so that no two positions of a text get the same place."""

_ODD = np.int64(0x9E3779B97F4A7C15 - 2**64)
_CONTEXT_ODD = np.int64(0xC2B2AE3D27D4EB4F - 2**64)


def places(hashes: NDArray[np.int64], positions: NDArray[np.int64]) -> list[int]:
    """One number for position and text of each of `n` blocks; different ones are equal but for about 2^-64.

    Args:
        hashes: of their tokens, see `token_hashes`, `[n]`.
        positions: `[n]`.
    """
    found: list[int] = (hashes + positions * POSITION).tolist()
    return found


def contexts(hashes: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number for all that stands before each of the blocks of a request: different ones are equal but by chance.

    Args:
        hashes: of their tokens, from the first block on, see `token_hashes`, `[n]`.
    """
    mixed = (hashes ^ (np.arange(len(hashes), dtype=np.int64) * _ODD)) * _CONTEXT_ODD
    mixed = (mixed ^ mixed >> 31) * _ODD
    found: NDArray[np.int64] = np.cumsum(mixed) - mixed
    return found


class TokenIndex:
    """Resident pages by bucket, those that served last first.

    Candidates are only candidates: tokens, or K and V, decide. For schedulers, which know tokens and pages but not
    their content; where signatures of the content are at hand, see `ResidentIndex`.
    """

    def __init__(self) -> None:
        self._pages: dict[Hashable, dict[int, array[int]]] = {}
        self._buckets: dict[int, tuple[Bucket, ...]] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def __contains__(self, page: int) -> bool:
        return page in self._buckets

    def pages(self, owner: Hashable, places: Iterable[int]) -> NDArray[np.int64]:
        """At most `MOST` resident pages of each of these places of an owner, in their order, int64 `[n]`, read-only.

        Which page is where, the caller knows.
        """
        found = list(map(self._pages.get(owner, {}).get, places, repeat(NONE)))
        if max(map(len, found), default=0) > MOST:
            found = [pages[:MOST] for pages in found]
        return np.frombuffer(b"".join(found), np.int64)

    def candidates(self, buckets: Iterable[Bucket], count: int) -> list[int]:
        """At most `count` resident pages of `buckets`, each once."""
        found: dict[int, None] = {}
        for page in chain.from_iterable(map(self._of, buckets)):
            found[page] = None
            if len(found) == count:
                break
        return list(found)

    def holds(self, bucket: Bucket, page: int) -> bool:
        """Whether `page` is resident in `bucket`."""
        return bucket in self._buckets.get(page, ())

    def add(self, buckets: Iterable[Bucket], page: int) -> None:
        """Make `page` resident in `buckets`. Raises IntegrityError when it is already."""
        if page in self._buckets:
            raise IntegrityError("a page is added to the index twice")
        self._buckets[page] = tuple(dict.fromkeys(buckets))
        for owner, place in self._buckets[page]:
            self._pages.setdefault(owner, {}).setdefault(place, array("q")).append(page)

    def prefer(self, page: int) -> None:
        """Offer `page` first from now on: it has just served a block."""
        for bucket in self._buckets.get(page, ()):
            pages = self._of(bucket)
            if pages[0] != page:
                pages.remove(page)
                pages.insert(0, page)

    def remove(self, page: int) -> None:
        """Forget `page`, for example because it is about to be written. Unknown pages are passed over."""
        for owner, place in self._buckets.pop(page, ()):
            places = self._pages[owner]
            places[place].remove(page)
            if not places[place]:
                del places[place]
            if not places:
                del self._pages[owner]

    def clear(self) -> None:
        """Forget everything."""
        self._pages.clear()
        self._buckets.clear()

    def check_integrity(self) -> None:
        """Raises IntegrityError when pages and buckets disagree."""
        held = [((owner, place), pages) for owner, places in self._pages.items() for place, pages in places.items()]
        listed = {(bucket, page) for bucket, pages in held for page in pages}
        known = {(bucket, page) for page, buckets in self._buckets.items() for bucket in buckets}
        if listed != known or sum(len(pages) for _, pages in held) != len(known):
            raise IntegrityError("a page is in a bucket it does not know of, twice, or missing")
        if not all(self._pages.values()) or not all(pages for _, pages in held):
            raise IntegrityError("an empty bucket was kept")

    def _of(self, bucket: Bucket) -> array[int]:
        owner, place = bucket
        return self._pages.get(owner, {}).get(place, NONE)
