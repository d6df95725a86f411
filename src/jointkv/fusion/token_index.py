"""Online search by equal text: which resident pages hold the same tokens as a newly filled block?"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from jointkv.errors import IntegrityError


class TokenIndex:
    """Resident pages by bucket, those that served last first.

    A bucket names everything that blocks must have in common before they are compared: isolation key, layer group,
    position and the hash of their tokens. Candidates are only candidates: K and V decide. For schedulers, which know
    tokens and pages but not their content; where signatures of the content are at hand, see `ResidentIndex`.
    """

    def __init__(self) -> None:
        self._pages: dict[Hashable, list[int]] = {}
        self._buckets: dict[int, tuple[Hashable, ...]] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def __contains__(self, page: int) -> bool:
        return page in self._buckets

    def buckets(self, buckets: Iterable[Hashable]) -> list[Sequence[int]]:
        """All resident pages of each of many buckets."""
        pages = self._pages
        return [pages.get(bucket, ()) for bucket in buckets]

    def candidates(self, buckets: Sequence[Hashable], count: int) -> list[int]:
        """At most `count` resident pages of `buckets`, each once."""
        found: dict[int, None] = {}
        for bucket in buckets:
            found.update(dict.fromkeys(self._pages.get(bucket, ())))
        return list(found)[:count]

    def add(self, buckets: Sequence[Hashable], page: int) -> None:
        """Make `page` resident in `buckets`. Raises IntegrityError when it is already."""
        if page in self._buckets:
            raise IntegrityError("a page is added to the index twice")
        self._buckets[page] = tuple(dict.fromkeys(buckets))
        for bucket in self._buckets[page]:
            self._pages.setdefault(bucket, []).append(page)

    def prefer(self, page: int) -> None:
        """Offer `page` first from now on: it has just served a block."""
        for bucket in self._buckets.get(page, ()):
            pages = self._pages[bucket]
            if pages[0] != page:
                pages.remove(page)
                pages.insert(0, page)

    def remove(self, page: int) -> None:
        """Forget `page`, for example because it is about to be written. Unknown pages are passed over."""
        for bucket in self._buckets.pop(page, ()):
            pages = self._pages[bucket]
            pages.remove(page)
            if not pages:
                del self._pages[bucket]

    def clear(self) -> None:
        """Forget everything."""
        self._pages.clear()
        self._buckets.clear()

    def check_integrity(self) -> None:
        """Raises IntegrityError when pages and buckets disagree."""
        listed = {(bucket, page) for bucket, pages in self._pages.items() for page in pages}
        known = {(bucket, page) for page, buckets in self._buckets.items() for bucket in buckets}
        if listed != known or sum(map(len, self._pages.values())) != len(known):
            raise IntegrityError("a page is in a bucket it does not know of, twice, or missing")
        if not all(self._pages.values()):
            raise IntegrityError("an empty bucket was kept")
