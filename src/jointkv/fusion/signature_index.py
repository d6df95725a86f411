"""Online search by content: which resident pages hold blocks like a newly filled one, whatever their text?"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jointkv.errors import IntegrityError

FEWEST = 4
"""Rows of the smallest matrix."""

FIRST = 16
"""Numbers of a signature that are compared of all pages: half the bytes of 32, which are what takes the time."""

AT_ONCE = 16
"""Nearest pages that are put in order before anybody asks for more."""


class _Bucket:
    """Signatures of the pages of one bucket, as the first `len(self)` rows of matrices.

    The distance in the first `FIRST` numbers is at most that in all, so the others are read of few rows alone.

    Attributes:
        pages: int64 `[rows]`.
        parts: first and other numbers, float32 `[rows, numbers]`, and their squares `[rows]`.
        row_of: by page.
    """

    def __init__(self, size: int) -> None:
        self.pages = np.zeros(FEWEST, np.int64)
        self.parts = [(np.zeros((FEWEST, numbers), np.float32), np.zeros(FEWEST, np.float32)) for numbers in _cut(size)]
        self.row_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.row_of)

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """All that has rows."""
        return [self.pages, *(array for part in self.parts for array in part)]

    def add(self, page: int, signature: NDArray[np.float32]) -> None:
        row = len(self)
        if row == len(self.pages):
            self._resize(2 * row)
        self.pages[row] = page
        for (numbers, squares), own in zip(self.parts, _parts(signature), strict=True):
            numbers[row], squares[row] = own, own @ own
        self.row_of[page] = row

    def remove(self, page: int) -> None:
        """The last row takes the place of the page's."""
        row, last = self.row_of.pop(page), len(self)
        if row != last:
            for rows in self.arrays:
                rows[row] = rows[last]
            self.row_of[int(self.pages[row])] = row
        if FEWEST < 4 * last <= len(self.pages):
            self._resize(len(self.pages) // 2)

    def within(self, signature: NDArray[np.float32], limit: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Pages within squared distance `limit` of `signature`, and their distances, `[n]` each."""
        (first, first_squares), *others = self.parts
        own, *other = _parts(signature)
        count, square = len(self), own @ own
        distance = first[:count] @ (-2 * own)
        distance += first_squares[:count]
        rows = np.flatnonzero(distance <= np.float32(limit - square))
        if not len(rows):
            return self.pages[:0], distance[:0]
        distance = distance[rows] + square
        for (numbers, squares), own in zip(others, other, strict=True):
            # Copying most rows would cost more than using all.
            product = (numbers[:count] @ own)[rows] if 4 * len(rows) > count else numbers[rows] @ own
            distance += squares[rows] + own @ own - 2 * product
            near = np.flatnonzero(distance <= np.float32(limit))
            rows, distance = rows[near], distance[near]
        return self.pages[rows], distance

    def _resize(self, rows: int) -> None:
        self.pages = _resized(self.pages, rows)
        self.parts = [(_resized(numbers, rows), _resized(squares, rows)) for numbers, squares in self.parts]


class SignatureIndex:
    """Resident pages by bucket, with their signatures; only those of one bucket are compared.

    A look-up is a product of a bucket's matrix and the new block's signature. Candidates are only candidates: K and V
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
        known = [self._buckets[name] for name in buckets if name in self._buckets]
        found = [bucket.within(signature, limit) for bucket in known]
        if any(len(pages) for pages, _ in found):
            pages, distances = (np.concatenate(parts) for parts in zip(*found, strict=True))
            yield from dict.fromkeys(_nearest_first(pages, distances))

    def clear(self) -> None:
        """Forget everything."""
        self._buckets.clear()
        self._of_page.clear()

    @staticmethod
    def most_bytes(size: int, pages: int) -> int:
        """Bytes of all matrices at the most, with `pages` pages in a bucket each: three of four rows may be free."""
        return 4 * pages * (4 * (size + 2) + 8)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(array.nbytes for bucket in self._buckets.values() for array in bucket.arrays)

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


def _cut(size: int) -> list[int]:
    """Numbers in each part of a signature."""
    return [FIRST, size - FIRST] if size > FIRST else [size]


def _parts(signature: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [signature[:FIRST], signature[FIRST:]] if len(signature) > FIRST else [signature]


def _resized(old: NDArray[Any], rows: int) -> NDArray[Any]:
    new, kept = np.zeros((rows, *old.shape[1:]), old.dtype), min(rows, len(old))
    new[:kept] = old[:kept]
    return new


def _nearest_first(pages: NDArray[np.int64], distances: NDArray[np.float32]) -> Iterator[int]:
    if len(pages) > AT_ONCE:
        first = np.argpartition(distances, AT_ONCE)
        head, tail = first[:AT_ONCE], first[AT_ONCE:]
        yield from pages[head[distances[head].argsort(kind="stable")]].tolist()
        pages, distances = pages[tail], distances[tail]
    yield from pages[distances.argsort(kind="stable")].tolist()
