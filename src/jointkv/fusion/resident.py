"""Online search: which resident block may already serve a newly filled one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from jointkv.core.bookkeeping import bookkeeping
from jointkv.errors import IntegrityError

NO_ENTRY = -1


class ResidentIndex:
    """Resident pages by bucket (isolation key, scope, layer group, position), with their fingerprints.

    Only blocks of one bucket are ever compared. Fingerprints are held in flat tensors, and each bucket lists its
    entries, oldest first; a look-up costs one matrix product per bucket asked for.

    Args:
        signature_size: length of the signatures.
        device: where signatures live (the pages' device); everything else is on the CPU.
    """

    @bookkeeping
    def __init__(self, signature_size: int, device: torch.device | str = "cpu") -> None:
        self._signature = torch.zeros(64, signature_size, device=device)
        self._square = torch.zeros(64, device=device)
        self._tokens = torch.zeros(64, dtype=torch.long)
        self._page = torch.full((64,), NO_ENTRY, dtype=torch.long)
        self._bucket_of: list[Hashable] = [None] * 64
        self._entry_of_page = torch.full((64,), NO_ENTRY, dtype=torch.long)
        self._free = torch.arange(63, -1, -1)
        self._free_count = 64
        self._buckets: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        return len(self._page) - self._free_count

    def __contains__(self, page: int) -> bool:
        return bool(self.contains(torch.tensor([page]))[0])

    def contains(self, pages: Tensor) -> Tensor:
        """Which of `pages [n]` are in the index, bool `[n]`."""
        known = pages < len(self._entry_of_page)
        found = self._entry_of_page[pages.clamp(max=len(self._entry_of_page) - 1)] != NO_ENTRY
        return known & found

    @bookkeeping
    def add(
        self,
        keys: Sequence[Hashable],
        which: Tensor,
        pages: Tensor,
        signatures: Tensor,
        tokens: Tensor | None = None,
    ) -> None:
        """Add blocks held by `pages [n]` to buckets.

        Args:
            keys, which: block `i` belongs to bucket `keys[which[i]]`.
            signatures: `[n, signature_size]`; rows that are not finite are left out.
            tokens: token hashes `[n]`, where known.

        Raises:
            IntegrityError: a page is named twice, or is in the index already.
        """
        if self.contains(pages).any() or len(pages.unique()) < len(pages):
            raise IntegrityError("a page is added to the index twice")
        finite = signatures.isfinite().all(1)
        signatures, kept = signatures[finite], finite.cpu()
        which, pages = which[kept], pages[kept]
        if not len(pages):
            return
        entries = self._take(len(pages))
        self._page[entries] = pages
        place = entries.to(self._signature.device)
        self._signature[place], self._square[place] = signatures, signatures.square().sum(1)
        self._tokens[entries] = 0 if tokens is None else tokens[kept]
        self._grow_page_map(pages)
        self._entry_of_page[pages] = entries
        for key, members in _by_bucket(keys, which):
            new = entries[members]
            self._buckets[key] = torch.cat((self._buckets[key], new)) if key in self._buckets else new
            for entry in new.tolist():
                self._bucket_of[entry] = key

    @bookkeeping
    def remove(self, pages: Tensor) -> None:
        """Forget `pages [n]`; those that are not in the index are passed over."""
        pages = pages[self.contains(pages)].unique()
        if not len(pages):
            return
        entries = self._entry_of_page[pages]
        self._entry_of_page[pages] = NO_ENTRY
        self._page[entries] = NO_ENTRY
        for key in {self._bucket_of[entry] for entry in entries.tolist()}:
            left = self._buckets[key]
            left = left[self._page[left] != NO_ENTRY]
            if len(left):
                self._buckets[key] = left
            else:
                del self._buckets[key]
        self._free[self._free_count : self._free_count + len(entries)] = entries
        self._free_count += len(entries)

    def clear(self) -> None:
        """Forget everything."""
        self.remove(self._page[self._page >= 0])

    def near(
        self, keys: Sequence[Hashable], which: Tensor, signatures: Tensor, limit: float, count: int
    ) -> tuple[Tensor, Tensor]:
        """Resident pages whose signature is within squared distance `limit`, nearest first.

        Args:
            keys, which: new block `i` looks in bucket `keys[which[i]]`.
            signatures: of the new blocks, `[n, signature_size]`.
            count: candidates per block at the most.

        Returns:
            pages long `[n, count]` (-1: none) and squared distances float32 `[n, count]` (infinite: none), on the CPU.
        """
        pages = torch.full((len(which), count), NO_ENTRY, dtype=torch.long)
        distances = torch.full((len(which), count), torch.inf)
        for key, members in _by_bucket(keys, which):
            entries = self._buckets.get(key)
            if entries is None:
                continue
            place, query = entries.to(self._signature.device), signatures[members.to(signatures.device)]
            if 2 * len(entries) > len(self._signature):  # copying most rows would cost more than using all
                product = (query @ self._signature.T)[:, place]
            else:
                product = query @ self._signature[place].T
            distance = query.square().sum(1, keepdim=True) + self._square[place] - 2 * product
            distance = distance.clamp(min=0).masked_fill(~(distance <= limit), torch.inf)
            best, order = (part.cpu() for part in distance.topk(min(count, len(entries)), largest=False))
            found = self._page[entries[order]].masked_fill(best.isinf(), NO_ENTRY)
            pages[members, : best.shape[1]], distances[members, : best.shape[1]] = found, best
        return pages, distances

    def same_tokens(self, keys: Sequence[Hashable], which: Tensor, tokens: Tensor, count: int) -> Tensor:
        """Resident pages whose token hash equals `tokens [n]`, oldest first: long `[n, count]` (-1: none)."""
        pages = torch.full((len(which), count), NO_ENTRY, dtype=torch.long)
        for key, members in _by_bucket(keys, which):
            entries = self._buckets.get(key)
            if entries is None:
                continue
            equal = self._tokens[entries] == tokens[members][:, None]
            first, order = equal.to(torch.uint8).sort(dim=1, descending=True, stable=True)
            first, order = first[:, :count], order[:, :count]
            pages[members, : first.shape[1]] = self._page[entries[order]].masked_fill(first == 0, NO_ENTRY)
        return pages

    def check_integrity(self) -> None:
        """Raises IntegrityError when maps between pages, entries and buckets disagree."""
        alive = (self._page >= 0).nonzero().squeeze(1)
        if len(alive) != len(self):
            raise IntegrityError("live and free entries do not add up")
        if not torch.equal(self._entry_of_page[self._page[alive]], alive):
            raise IntegrityError("page and entry disagree")
        if int((self._entry_of_page >= 0).sum()) != len(alive):
            raise IntegrityError("a page maps to a dead entry")
        listed = torch.cat([torch.zeros(0, dtype=torch.long), *self._buckets.values()])
        if not torch.equal(listed.sort().values, alive):
            raise IntegrityError("a live entry is in no bucket, or in two")
        for key, entries in self._buckets.items():
            if not len(entries) or any(self._bucket_of[entry] != key for entry in entries.tolist()):
                raise IntegrityError("an entry is in the wrong bucket, or a bucket is empty")

    def _take(self, count: int) -> Tensor:
        if count > self._free_count:
            old = len(self._page)
            extra = max(old, count)
            pad = torch.nn.functional.pad
            self._signature, self._square = pad(self._signature, (0, 0, 0, extra)), pad(self._square, (0, extra))
            self._tokens = pad(self._tokens, (0, extra))
            self._bucket_of.extend([None] * extra)
            self._page = pad(self._page, (0, extra), value=NO_ENTRY)
            added = torch.arange(old + extra - 1, old - 1, -1)
            held = self._free[: self._free_count]
            self._free = torch.cat((added, held, torch.empty(old - len(held), dtype=torch.long)))
            self._free_count += extra
        self._free_count -= count
        return self._free[self._free_count : self._free_count + count].clone()

    def _grow_page_map(self, pages: Tensor) -> None:
        needed = int(pages.max()) + 1 - len(self._entry_of_page)
        if needed > 0:
            extra = max(needed, len(self._entry_of_page))
            self._entry_of_page = torch.nn.functional.pad(self._entry_of_page, (0, extra), value=NO_ENTRY)


def _by_bucket(keys: Sequence[Hashable], which: Tensor) -> Iterator[tuple[Hashable, Tensor]]:
    """The buckets that are asked for, each with the numbers of its blocks, in order."""
    order = which.argsort(stable=True)
    used, sizes = which[order].unique_consecutive(return_counts=True)
    for index, members in zip(used.tolist(), order.split(sizes.tolist()), strict=True):
        yield keys[index], members
