"""Pages of one KV memory: who holds which, how often, and what is free."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jointkv.core.blocks import PagedKV
from jointkv.core.bookkeeping import bookkeeping
from jointkv.errors import IntegrityError, LayoutError, PoolFull

NULL_PAGE = 0
"""Always zero, never handed out: padding may read it, nothing writes it."""

FIRST_PAGES = 64


class Holder(Protocol):
    """What holds references to pages, such as a block table."""

    def held(self) -> Tensor:
        """The page of every reference, `[n]`."""


@dataclass(frozen=True, eq=False)
class _Held:
    """Pages that somebody reads who has no block table."""

    pages: Tensor

    def held(self) -> Tensor:
        return self.pages


class BlockPool:
    """Allocates, shares and frees pages, and counts the references that registered holders have.

    The tensors grow by doubling, one layer after the other, up to `max_pages`; pages that were never written cost
    no physical memory on the CPU. Freed pages are handed out again first, so the touched memory stays small.

    Args:
        num_layers: layers per group: tensors for K, and as many for V.
        block_size: tokens per page.
        key_shape, value_shape: `(heads, head size)`.
        max_pages: pages at the most, the null page not counted; None for no limit.

    Raises:
        LayoutError: not even the first pages fit into memory.
    """

    @bookkeeping
    def __init__(
        self,
        num_layers: int,
        block_size: int,
        key_shape: tuple[int, int],
        value_shape: tuple[int, int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_pages: int | None = None,
    ) -> None:
        self.max_pages = max_pages
        first = FIRST_PAGES if max_pages is None else min(FIRST_PAGES, max_pages)
        try:
            self._keys, self._values = (
                [torch.empty(first + 1, block_size, *shape, dtype=dtype, device=device) for _ in range(num_layers)]
                for shape in (key_shape, value_shape)
            )
        except (RuntimeError, TypeError) as error:  # no memory; a size that no tensor has
            raise LayoutError(
                f"{first + 1} pages of {block_size} tokens in {num_layers} layers do not fit into the memory of "
                f"{device}: take a smaller block_size, or fewer max_pages than {first}"
            ) from error
        for layer in (*self._keys, *self._values):
            layer[NULL_PAGE] = 0
        self.kv = PagedKV(self._keys, self._values)
        self.references = torch.zeros(first + 1, dtype=torch.long)
        self._free = torch.arange(first, 0, -1)
        self._free_count = first
        # Holders know the pool; the pool must not keep them alive.
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()
        self._on_free: list[Callable[[Tensor], None]] = []
        self._dropped: deque[Tensor] = deque()
        self.peak_used = 0

    @property
    def block_size(self) -> int:
        return self.kv.block_size

    @property
    def num_pages(self) -> int:
        """Pages that exist now, without the null page."""
        return self.kv.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages free now, without those that growing would add."""
        self.collect_dropped()
        return self._free_count

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.num_used * self.kv.page_nbytes

    def register(self, holder: Holder) -> None:
        """Count what `holder` holds as the references that `check_integrity` expects."""
        self._holders.add(holder)

    def on_free(self, callback: Callable[[Tensor], None]) -> None:
        """Call `callback(pages)` when pages become free, before any of them can be handed out again."""
        self._on_free.append(callback)

    def off_free(self, callback: Callable[[Tensor], None]) -> None:
        """Undo `on_free`."""
        self._on_free.remove(callback)

    def drop(self, pages: Tensor) -> None:
        """Free `pages`, except where they are negative, at the next call that asks what is free.

        For destructors, which may run in the middle of another call, or where a compiler has replaced all operations.
        """
        self._dropped.append(pages)

    def collect_dropped(self) -> None:
        """Free what was dropped.

        Who looks for pages by their content calls it before: what is found then may be dropped later, and handed out
        again, unless `holding` keeps it.
        """
        while self._dropped:
            pages = self._dropped.popleft()
            self.free(pages[pages >= 0])

    @contextmanager
    def holding(self, pages: Tensor) -> Iterator[None]:
        """Keep the used `pages [n]` as they are meanwhile, whoever drops them.

        Raises:
            IntegrityError: one of them is free.
        """
        held = _Held(pages)
        self.share(pages)
        self._holders.add(held)
        try:
            yield
        finally:
            self._holders.discard(held)
            self.free(pages)

    def missing(self, count: int) -> int:
        """How many of `count` pages the pool could not give, growth included."""
        if self.max_pages is None:
            return 0
        return max(0, count - (self.max_pages - self.num_used))

    @bookkeeping
    def allocate(self, count: int) -> Tensor:
        """Take `count` free pages with one reference each: long `[count]`. Their content is undefined.

        Raises:
            PoolFull: fewer are left; nothing was taken.
        """
        self.collect_dropped()
        missing = self.missing(count)
        if missing:
            raise PoolFull(missing, count, self.max_pages or 0)
        if count > self._free_count:
            self._grow(self.num_used + count)
        self._free_count -= count
        pages = self._free[self._free_count : self._free_count + count].flip(0)
        self.references[pages] = 1
        self.peak_used = max(self.peak_used, self.num_used)
        return pages

    @bookkeeping
    def share(self, pages: Tensor) -> None:
        """Add one reference for every entry of `pages`; an entry may repeat."""
        self._assert_used(pages)
        self.references.index_add_(0, pages, torch.ones_like(pages))

    @bookkeeping
    def free(self, pages: Tensor) -> int:
        """Drop one reference for every entry of `pages`; returns how many pages became free.

        Raises what a callback of `on_free` raises, when all of them have been called and the pages are free.
        """
        self._assert_used(pages)
        self.references.index_add_(0, pages, -torch.ones_like(pages))
        if (self.references[pages] < 0).any():
            self.references.index_add_(0, pages, torch.ones_like(pages))
            raise IntegrityError("a page was freed more often than it was referenced")
        released = pages[self.references[pages] == 0].unique()
        if len(released):
            with ExitStack() as told:
                # All of them, also where one fails: the others would go on finding what is not there any more.
                told.callback(self._put_back, released)
                for callback in reversed(self._on_free):
                    told.callback(callback, released)
        return len(released)

    @bookkeeping
    def copy_pages(self, source: Tensor, target: Tensor, scales: Tensor | None = None) -> None:
        """Write pages `source` into `target`, times the scales `[2, layers, n]` of K and V where given."""
        device = self.kv.device
        source, target = source.to(device), target.to(device)
        for side, layers in enumerate((self.kv.keys, self.kv.values)):
            for index, layer in enumerate(layers):
                content = layer[source]
                if scales is not None:
                    content = (content.float() * scales[side, index].to(device).view(-1, 1, 1, 1)).to(layer.dtype)
                layer[target] = content

    def check_integrity(self) -> None:
        """Compare the counts with what the registered holders hold, and what was dropped. Changes nothing.

        Raises:
            IntegrityError: `free + used != total`, a free page is referenced, or a count differs from the number of
                references held.
        """
        holders = list(self._holders)  # from here on none of them is dropped
        held = [*(holder.held() for holder in holders), *(pages[pages >= 0] for pages in list(self._dropped))]
        free = self._free[: self._free_count]
        if len(free.unique()) != len(free):
            raise IntegrityError("a page is on the free list twice")
        if self._free_count + int((self.references > 0).sum()) != self.num_pages:
            raise IntegrityError("free + used != total")
        if self.references[free].any() or self.references[NULL_PAGE]:
            raise IntegrityError("a free page, or the null page, is referenced")
        expected = torch.zeros_like(self.references)
        for pages in held:
            expected.index_add_(0, pages, torch.ones_like(pages))
        if not torch.equal(expected, self.references):
            page = int((expected != self.references).nonzero()[0])
            raise IntegrityError(
                f"page {page}: {int(self.references[page])} references counted, {int(expected[page])} held"
            )

    def _put_back(self, pages: Tensor) -> None:
        self._free[self._free_count : self._free_count + len(pages)] = pages.flip(0)
        self._free_count += len(pages)

    def _assert_used(self, pages: Tensor) -> None:
        if len(pages) and (self.references[pages] <= 0).any():
            raise IntegrityError("a free page was shared or freed")

    def _grow(self, needed: int) -> None:
        old = self.num_pages
        new = max(needed, 2 * old) if self.max_pages is None else min(max(needed, 2 * old), self.max_pages)
        for layers in (self._keys, self._values):
            for index, layer in enumerate(layers):
                # One layer at a time: the old tensor goes before the next one is copied.
                larger = torch.empty(new + 1, *layer.shape[1:], dtype=layer.dtype, device=layer.device)
                larger[: old + 1] = layer
                layers[index] = larger
        self.kv = PagedKV(self._keys, self._values)
        self.references = torch.nn.functional.pad(self.references, (0, new - old))
        added = torch.arange(new, old, -1)
        held = self._free[: self._free_count]
        self._free = torch.cat((added, held, torch.empty(old - len(held), dtype=torch.long)))
        self._free_count += new - old
