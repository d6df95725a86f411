"""Online search: which resident block may already serve a newly filled one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from jointkv.errors import IntegrityError
from jointkv.state import bookkeeping

NO_ENTRY = -1


class ResidentIndex:
    """Resident pages by bucket (isolation key, scope, layer group, position), with their fingerprints.

    Only blocks of one bucket are ever compared. Everything is held in flat tensors; entries of one bucket are found
    through a padded `[buckets, width]` matrix, so a batch of look-ups is a few tensor operations.

    Args:
        signature_size: length of the signatures; 0 for an index of token hashes alone.
        device: where signatures live (the pages' device); everything else is on the CPU.
    """

    @bookkeeping
    def __init__(self, signature_size: int, device: torch.device | str = "cpu") -> None:
        self._signature = torch.zeros(64, signature_size, device=device)
        self._tokens = torch.zeros(64, dtype=torch.long)
        self._page = torch.full((64,), NO_ENTRY, dtype=torch.long)
        self._bucket_of = torch.zeros(64, dtype=torch.long)
        self._entry_of_page = torch.full((64,), NO_ENTRY, dtype=torch.long)
        self._free = torch.arange(63, -1, -1)
        self._free_count = 64
        self._rows: dict[Hashable, int] = {}
        self._keys: list[Hashable] = []
        self._members = torch.full((0, 4), NO_ENTRY, dtype=torch.long)

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
        signatures: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        """Add blocks held by `pages [n]` to buckets.

        Args:
            keys, which: block `i` belongs to bucket `keys[which[i]]`.
            signatures: `[n, signature_size]`; rows that are not finite are left out.
            tokens: token hashes `[n]`, where known.
        """
        count = len(pages)
        if not count:
            return
        if self.contains(pages).any() or len(pages.unique()) < count:
            raise IntegrityError("a page is added to the index twice")
        if signatures is not None:
            finite = signatures.isfinite().all(1).cpu()
            if not finite.all():
                tokens = None if tokens is None else tokens[finite]
                return self.add(keys, which[finite], pages[finite], signatures[finite.to(signatures.device)], tokens)
        used, which = which.unique(return_inverse=True)
        rows = torch.tensor([self._row(keys[index]) for index in used.tolist()])[which]
        entries = self._take(count)
        self._page[entries], self._bucket_of[entries] = pages, rows
        if signatures is not None:
            self._signature[entries.to(self._signature.device)] = signatures
        self._tokens[entries] = torch.zeros_like(pages) if tokens is None else tokens
        self._grow_page_map(pages)
        self._entry_of_page[pages] = entries
        self._place(rows, entries)

    @bookkeeping
    def remove(self, pages: Tensor) -> None:
        """Forget `pages [n]`; those that are not in the index are passed over."""
        pages = pages[self.contains(pages)].unique()
        if not len(pages):
            return
        entries = self._entry_of_page[pages]
        self._entry_of_page[pages] = NO_ENTRY
        self._page[entries] = NO_ENTRY
        rows = self._bucket_of[entries].unique()
        lines = self._members[rows]
        gone = (lines >= 0) & (self._page[lines.clamp(min=0)] == NO_ENTRY)
        lines = lines.masked_fill(gone, NO_ENTRY)
        # Entries stay packed at the left, in the order of their arrival.
        order = (lines < 0).to(torch.uint8).argsort(dim=1, stable=True)
        self._members[rows] = lines.gather(1, order)
        self._free[self._free_count : self._free_count + len(entries)] = entries
        self._free_count += len(entries)
        empty = rows[(self._members[rows] < 0).all(1)]
        for row in empty.flip(0).tolist():  # the highest first: dropping moves the last bucket
            self._drop_bucket(row)

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
            pages long `[n, count]` (-1: none) and squared distances float32 `[n, count]`, on the CPU.
        """
        entries = self._entries(keys, which)
        if not entries.shape[1]:
            return entries, torch.zeros(entries.shape)
        distance = self._distances(entries, signatures)
        distance = distance.masked_fill((entries < 0) | ~(distance <= limit), torch.inf)
        best, place = distance.topk(min(count, distance.shape[1]), largest=False)
        pages = self._page[entries.gather(1, place).clamp(min=0)].masked_fill(best.isinf(), NO_ENTRY)
        return pages, best

    def same_tokens(self, keys: Sequence[Hashable], which: Tensor, tokens: Tensor, count: int) -> Tensor:
        """Resident pages whose token hash equals `tokens [n]`, oldest first: long `[n, count]` (-1: none)."""
        entries = self._entries(keys, which)
        if not entries.shape[1]:
            return entries
        equal = (entries >= 0) & (self._tokens[entries.clamp(min=0)] == tokens[:, None])
        first, place = equal.to(torch.uint8).sort(dim=1, descending=True, stable=True)
        place, first = place[:, :count], first[:, :count]
        return self._page[entries.gather(1, place).clamp(min=0)].masked_fill(first == 0, NO_ENTRY)

    def check_integrity(self) -> None:
        """Raises IntegrityError when maps between pages, entries and buckets disagree."""
        alive = (self._page >= 0).nonzero().squeeze(1)
        if len(alive) != len(self):
            raise IntegrityError("live and free entries do not add up")
        if not torch.equal(self._entry_of_page[self._page[alive]], alive):
            raise IntegrityError("page and entry disagree")
        if int((self._entry_of_page >= 0).sum()) != len(alive):
            raise IntegrityError("a page maps to a dead entry")
        listed = self._members[self._members >= 0]
        if not torch.equal(listed.sort().values, alive):
            raise IntegrityError("a live entry is in no bucket, or in two")
        rows = (self._members >= 0).nonzero()[:, 0]
        if not torch.equal(self._bucket_of[listed], rows):
            raise IntegrityError("an entry is in the wrong bucket")

    def _entries(self, keys: Sequence[Hashable], which: Tensor) -> Tensor:
        """Entries of each block's bucket, `[n, width]`, cut to the fullest of them."""
        if not len(self._members):
            return torch.full((len(which), 0), NO_ENTRY, dtype=torch.long)
        rows = torch.tensor([self._rows.get(key, NO_ENTRY) for key in keys])[which]
        entries = self._members[rows.clamp(min=0)].masked_fill((rows < 0)[:, None], NO_ENTRY)
        return entries[:, : int((entries >= 0).sum(1).max())] if len(entries) else entries[:, :0]

    def _distances(self, entries: Tensor, signatures: Tensor, *, workspace: int = 1 << 22) -> Tensor:
        """Squared distances `[n, width]` between `signatures [n, s]` and those of `entries [n, width]`."""
        step = max(1, workspace // max(1, entries.shape[1] * self._signature.shape[1]))
        parts = []
        for start in range(0, len(entries), step):
            part = entries[start : start + step].clamp(min=0).to(self._signature.device)
            query = signatures[start : start + step]
            resident = self._signature[part]
            product = (resident @ query[:, :, None]).squeeze(2)
            distance = resident.square().sum(2) + query.square().sum(1, keepdim=True) - 2 * product
            parts.append(distance.clamp(min=0).cpu())
        return torch.cat(parts)

    def _row(self, key: Hashable) -> int:
        row = self._rows.get(key)
        if row is None:
            row = len(self._keys)
            self._rows[key] = row
            self._keys.append(key)
            if row >= len(self._members):
                extra = max(64, len(self._members))
                self._members = torch.nn.functional.pad(self._members, (0, 0, 0, extra), value=NO_ENTRY)
        return row

    def _drop_bucket(self, row: int) -> None:
        """Remove an empty bucket; the last one takes its place, so the matrix stays dense."""
        last = len(self._keys) - 1
        del self._rows[self._keys[row]]
        if row != last:
            self._keys[row] = self._keys[last]
            self._rows[self._keys[row]] = row
            self._members[row] = self._members[last]
            moved = self._members[row]
            self._bucket_of[moved[moved >= 0]] = row
            self._members[last] = NO_ENTRY
        self._keys.pop()

    def _take(self, count: int) -> Tensor:
        if count > self._free_count:
            old = len(self._page)
            extra = max(old, count)
            pad = torch.nn.functional.pad
            self._signature = pad(self._signature, (0, 0, 0, extra))
            self._tokens, self._bucket_of = pad(self._tokens, (0, extra)), pad(self._bucket_of, (0, extra))
            self._page = pad(self._page, (0, extra), value=NO_ENTRY)
            added = torch.arange(old + extra - 1, old - 1, -1)
            held = self._free[: self._free_count]
            self._free = torch.cat((added, held, torch.empty(old - len(held), dtype=torch.long)))
            self._free_count += extra
        self._free_count -= count
        return self._free[self._free_count : self._free_count + count].clone()

    def _place(self, rows: Tensor, entries: Tensor) -> None:
        """Append `entries` to their buckets' lines, in order."""
        order = rows.argsort(stable=True)
        rows, entries = rows[order], entries[order]
        _, sizes = rows.unique_consecutive(return_counts=True)
        rank = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        column = (self._members[rows] >= 0).sum(1) + rank
        width = int(column.max()) + 1
        if width > self._members.shape[1]:
            extra = max(width - self._members.shape[1], self._members.shape[1])
            self._members = torch.nn.functional.pad(self._members, (0, extra), value=NO_ENTRY)
        self._members[rows, column] = entries

    def _grow_page_map(self, pages: Tensor) -> None:
        needed = int(pages.max()) + 1 - len(self._entry_of_page)
        if needed > 0:
            extra = max(needed, len(self._entry_of_page))
            self._entry_of_page = torch.nn.functional.pad(self._entry_of_page, (0, extra), value=NO_ENTRY)
