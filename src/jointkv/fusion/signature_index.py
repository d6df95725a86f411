"""Online search by content: which resident pages hold blocks like a newly filled one, whatever their text?"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from jointkv.errors import IntegrityError

FEWEST = 4
"""Rows of the smallest matrix."""

AT_ONCE = 16
"""Nearest pages that are put in order before anybody asks for more."""


class _Bucket:
    """Signatures of the pages of one bucket, as the first `len(self)` rows of a matrix.

    Attributes:
        pages: int64 `[rows]`.
        signatures, squares: float32 `[rows, size]`, `[rows]`.
        row_of: by page.
    """

    def __init__(self, size: int) -> None:
        self.pages = np.zeros(FEWEST, np.int64)
        self.signatures = np.zeros((FEWEST, size), np.float32)
        self.squares = np.zeros(FEWEST, np.float32)
        self.row_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.row_of)

    def add(self, page: int, signature: NDArray[np.float32]) -> None:
        row = len(self)
        if row == len(self.pages):
            self._resize(2 * row)
        self.pages[row], self.signatures[row], self.squares[row] = page, signature, signature @ signature
        self.row_of[page] = row

    def remove(self, page: int) -> None:
        """The last row takes the place of the page's."""
        row, last = self.row_of.pop(page), len(self)
        if row != last:
            for rows in (self.pages, self.signatures, self.squares):
                rows[row] = rows[last]
            self.row_of[int(self.pages[row])] = row
        if FEWEST < 4 * last <= len(self.pages):
            self._resize(len(self.pages) // 2)

    def distances(self, signature: NDArray[np.float32]) -> NDArray[np.float32]:
        """Squared, less that of `signature` alone: `[len(self)]`."""
        found: NDArray[np.float32] = self.signatures[: len(self)] @ signature
        found *= -2
        found += self.squares[: len(self)]
        return found

    def _resize(self, rows: int) -> None:
        kept = min(rows, len(self.pages))
        for name in ("pages", "signatures", "squares"):
            old = getattr(self, name)
            new = np.zeros((rows, *old.shape[1:]), old.dtype)
            new[:kept] = old[:kept]
            setattr(self, name, new)


class SignatureIndex:
    """Resident pages by bucket, with their signatures; only those of one bucket are compared.

    A look-up is one product of a bucket's matrix and the new block's signature. Candidates are only candidates: K and V
    decide. For schedulers, which have no tensors; where there are, see `ResidentIndex`, and for text `TokenIndex`.

    Args:
        size: numbers of a signature.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._buckets: dict[Hashable, _Bucket] = {}
        self._of_page: dict[int, tuple[Hashable, ...]] = {}

    def __len__(self) -> int:
        return len(self._of_page)

    def __contains__(self, page: int) -> bool:
        return page in self._of_page

    def __iter__(self) -> Iterator[int]:
        """All pages."""
        return iter(self._of_page)

    def add(self, buckets: Iterable[Hashable], page: int, signature: NDArray[np.float32]) -> None:
        """Make `page` resident in `buckets`. Raises IntegrityError when it is already, or has no numbers."""
        if page in self._of_page:
            raise IntegrityError("a page is added to the index of signatures twice")
        if signature.shape != (self.size,) or not np.isfinite(signature).all():
            raise IntegrityError(f"a signature is not {self.size} numbers")
        self._of_page[page] = tuple(dict.fromkeys(buckets))
        for name in self._of_page[page]:
            self._buckets.setdefault(name, _Bucket(self.size)).add(page, signature)

    def remove(self, page: int) -> None:
        """Forget `page`, for example because it is about to be written. Unknown pages are passed over."""
        for name in self._of_page.pop(page, ()):
            bucket = self._buckets[name]
            bucket.remove(page)
            if not len(bucket):
                del self._buckets[name]

    def near(self, buckets: Iterable[Hashable], signature: NDArray[np.float32], limit: float) -> Iterator[int]:
        """Pages of `buckets` within squared distance `limit` of `signature`, nearest first, each once.

        The index may lose pages while they are asked for.
        """
        pages, distances = [], []
        within = np.float32(limit - signature @ signature)
        for name in buckets:
            bucket = self._buckets.get(name)
            if bucket is None:
                continue
            found = bucket.distances(signature)
            chosen = np.flatnonzero(found <= within)
            if len(chosen):
                pages.append(bucket.pages[chosen])
                distances.append(found[chosen])
        if pages:
            yield from dict.fromkeys(_nearest_first(np.concatenate(pages), np.concatenate(distances)))

    def clear(self) -> None:
        """Forget everything."""
        self._buckets.clear()
        self._of_page.clear()

    @staticmethod
    def most_bytes(size: int, pages: int) -> int:
        """Bytes of all matrices at the most, with `pages` pages in a bucket each: three of four rows may be free."""
        return 4 * pages * (4 * (size + 1) + 8)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        arrays = ((one.pages, one.signatures, one.squares) for one in self._buckets.values())
        return sum(array.nbytes for bucket in arrays for array in bucket)

    def check_integrity(self) -> None:
        """Raises IntegrityError when pages, rows and buckets disagree."""
        listed = {(name, page) for name, bucket in self._buckets.items() for page in bucket.row_of}
        if listed != {(name, page) for page, names in self._of_page.items() for name in names}:
            raise IntegrityError("a page is in a bucket of signatures it does not know of, or missing")
        for bucket in self._buckets.values():
            if not len(bucket) or sorted(bucket.row_of.values()) != list(range(len(bucket))):
                raise IntegrityError("a bucket of signatures is empty or has holes")
            if any(int(bucket.pages[row]) != page for page, row in bucket.row_of.items()):
                raise IntegrityError("a row of signatures is another page's")


def _nearest_first(pages: NDArray[np.int64], distances: NDArray[np.float32]) -> Iterator[int]:
    if len(pages) > AT_ONCE:
        first = np.argpartition(distances, AT_ONCE)
        head, tail = first[:AT_ONCE], first[AT_ONCE:]
        yield from pages[head[distances[head].argsort(kind="stable")]].tolist()
        pages, distances = pages[tail], distances[tail]
    yield from pages[distances.argsort(kind="stable")].tolist()
