"""The scheduler's block tables: the one place where pages change hands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
)
from vllm.v1.request import Request, RequestStatus

from jointkv.errors import IntegrityError
from jointkv.vllm_plugin.engine.events import PrivateEvents
from jointkv.vllm_plugin.engine.pages import NULL_PAGE


class BlockTables:
    """A view of vLLM's block tables and page pool, with the one change the plugin makes to them.

    Args:
        manager: the scheduler's. Owned by vLLM; every change goes through its pool's own methods.

    Attributes:
        held: pages that are written for requests which do not read them yet.
        lent: pages that are kept for requests which read them at no slot of their own, by how often.
        kept: pages of requests that have left, each with the step that may still write them. vLLM frees them after it,
            where other connectors load pages and steps overlap.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self.pool = manager.block_pool
        self.groups = manager.coordinator.single_type_managers
        self.prefix_caching = manager.enable_caching
        self.events = PrivateEvents(self.pool)
        self.held: set[int] = set()
        self.lent: Counter[int] = Counter()
        self.kept: Iterable[tuple[int, Iterable[KVCacheBlock]]] = ()

    def block(self, request_id: str, group: int, slot: int) -> KVCacheBlock | None:
        """The block that `request_id` holds at `slot`, or None."""
        blocks = self.groups[group].req_to_blocks.get(request_id, ())
        return blocks[slot] if slot < len(blocks) else None

    def may_replace(self, request: Request, epoch: int, group: int, slot: int, own: int) -> str | None:
        """Why page `own` cannot be replaced at `slot` of `request`'s table now; None if it can."""
        if request.status != RequestStatus.RUNNING or request.num_preemptions != epoch:
            return "request_gone"
        block = self.block(request.request_id, group, slot)
        if block is None or block.block_id != own:
            return "entry_changed"
        if block.ref_cnt != 1:
            return "page_shared"
        cached = self.groups[group].num_cached_block.get(request.request_id, 0)
        if self.prefix_caching and slot >= cached:
            return "not_cached_yet"
        return None

    def replace(self, request_id: str, group: int, slot: int, page: int) -> None:
        """Read `page` at `slot` from now on and give the old page back to the pool.

        The old page keeps its prefix-cache hash: its content is exactly what the hash stands for until the pool
        hands it out again, which evicts the hash. So does the page that is read now.
        """
        blocks = self.groups[group].req_to_blocks[request_id]
        old, new = blocks[slot], self.pool.blocks[page]
        self.pool.touch([new])
        blocks[slot] = new
        self.pool.free_blocks([old])

    def make_private(self, request: Request, start: int, end: int | None, secret: bytes) -> None:
        """`request` looks up its blocks of tokens `start` to `end` (or all) by hashes that nobody else has.

        What it computes behind an approximated block is not what an exact hash promises to others. To the request
        itself its blocks are its own: after a preemption it reads them again instead of computing them again. Hashes
        of later blocks chain on from these, which makes them private as well.

        Args:
            start, end: multiples of every group's block size.
            secret: what the hashes are made of; different for every request.
        """
        hashes, size = request.block_hashes, self.pool.hash_block_size
        last = len(hashes) if end is None else end // size
        for number in range(start // size, last):
            hashes[number] = BlockHash(sha256(secret + number.to_bytes(8, "big")).digest())
        self.events.hide(hashes[start // size :])

    def make_exact(self, request: Request) -> None:
        """`request`, of which nothing is computed yet, looks up all its blocks by the hashes of their text again."""
        request.block_hashes.clear()
        request.update_block_hashes()

    def answer_for(self, request: Request, start: int, end: int | None) -> None:
        """Of tokens `start` to `end` (or all) the pages that `request` holds answer for its hashes, and no others."""
        for number, group in enumerate(self.groups):
            blocks = group.req_to_blocks.get(request.request_id, [])
            last = min(len(blocks), group.num_cached_block.get(request.request_id, 0))
            if end is not None:
                last = min(last, end // group.block_size)
            for slot in range(start // group.block_size, last):
                if blocks[slot].is_null:
                    continue
                self.lead_to(request, number, slot, blocks[slot].block_id)

    def lead_to(self, request: Request, group: int, slot: int, page: int) -> None:
        """The hash that `request` has for `slot` leads to `page`, and to no other, until the pool hands it out."""
        tokens = (slot + 1) * self.groups[group].block_size
        key = make_block_hash_with_group_id(request.block_hashes[tokens // self.pool.hash_block_size - 1], group)
        self._forget(key)
        self.pool._insert_block_hash(key, self.pool.blocks[page], num_tokens=tokens)

    def lead_nowhere(self, request: Request, slot: int) -> None:
        """The private hash that `request` has for `slot` leads to no page."""
        tokens = (slot + 1) * self.groups[0].block_size
        self._forget(make_block_hash_with_group_id(request.block_hashes[tokens // self.pool.hash_block_size - 1], 0))

    @contextmanager
    def taken(self, count: int, keep: Iterable[int]) -> Iterator[list[int]]:
        """Take `count` free pages, none of `keep`, for as long as nobody knows what they hold; none if there are fewer.

        Afterwards they are free again, and those that a hash leads to by then are handed out last.
        """
        kept = [self.pool.blocks[page] for page in sorted(set(keep))]
        self.pool.touch(kept)
        try:
            taken = self.pool.get_new_blocks(count) if count <= self.pool.get_num_free_blocks() else []
        finally:
            self.pool.free_blocks(kept)
        try:
            yield [block.block_id for block in taken]
        finally:
            self.pool.free_blocks(taken)

    def hold(self) -> int | None:
        """Take a free page and keep it until it is released; None unless one for each table is left, which may grow.

        A request for which there is none would be preempted.
        """
        if self.pool.get_num_free_blocks() <= sum(len(group.req_to_blocks) for group in self.groups):
            return None
        (block,) = self.pool.get_new_blocks(1)
        self.held.add(block.block_id)
        return int(block.block_id)

    def release(self, page: int) -> None:
        """A page that was held is its readers', or free where nobody reads it."""
        self.held.remove(page)
        self.pool.free_blocks([self.pool.blocks[page]])

    def lend(self, pages: Sequence[int]) -> None:
        """Keep `pages`, free or held by others, until they are taken back as often."""
        self.pool.touch([self.pool.blocks[page] for page in pages])
        self.lent.update(pages)

    def take_back(self, pages: Sequence[int]) -> None:
        """`pages` that were lent are free where nobody else holds them, and the last of them is handed out first."""
        self.lent -= Counter(pages)
        self.pool.free_blocks([self.pool.blocks[page] for page in reversed(pages)])

    def is_held(self, page: int) -> bool:
        """Whether somebody holds `page`."""
        return bool(self.pool.blocks[page].ref_cnt)

    @property
    def leads_to_none(self) -> bool:
        """Whether some request would find the null page."""
        return self.pool.null_block.block_hash is not None

    def without_page(self, request: Request, tokens: int) -> list[int]:
        """Slots among the first `tokens` of `request` at which it would find the null page now."""
        found = self.found_pages(request)[: tokens // self.groups[0].block_size]
        return [slot for slot, page in enumerate(found) if page == NULL_PAGE]

    def all_without_page(self) -> Iterator[tuple[str, list[int]]]:
        """Requests that hold the null page, and at which slots."""
        for request_id, blocks in self.groups[0].req_to_blocks.items():
            slots = [slot for slot, block in enumerate(blocks) if block.is_null]
            if slots:
                yield request_id, slots

    def renew(self, pages: Sequence[int]) -> None:
        """Hand `pages` out last, as if they had just been found, and the first of them last of all."""
        blocks = [self.pool.blocks[page] for page in reversed(pages)]
        self.pool.touch(blocks)
        self.pool.free_blocks(blocks)

    def found_pages(self, request: Request) -> list[int]:
        """Pages that vLLM's prefix cache has for `request` now, in order."""
        found = self._manager.get_computed_blocks(request)[0]
        return [block.block_id for blocks in found.blocks for block in blocks]

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self.pool.get_num_free_blocks()

    def needed(self, request: Request, pages: Iterable[int]) -> int:
        """Free pages that it takes to start `request`, which will find `pages`."""
        blocks = self.pool.blocks
        held = sum(1 for page in pages if page == NULL_PAGE or blocks[page].ref_cnt)
        return -(-request.num_tokens // self.groups[0].block_size) - held

    def always_fits(self, request: Request, more: int) -> bool:
        """Whether `request`, if it were alone, could end with so many pages `more` than its tokens take."""
        longest = request.num_prompt_tokens + request.max_tokens
        return -(-longest // self.groups[0].block_size) + more < self.pool.num_gpu_blocks

    def evict(self, pages: set[int]) -> None:
        """No hash leads to `pages` any more."""
        self.pool.evict_blocks(pages)

    def found(self, request: Request) -> int:
        """Tokens that vLLM's prefix cache has for `request` now."""
        return self._manager.get_computed_blocks(request)[1]

    def forget(self, request: Request, start: int) -> None:
        """No page answers for the private hashes of `request` any more, which begin at token `start`.

        Pages that many read would otherwise collect the hashes of all who ever read them.
        """
        for private in request.block_hashes[start // self.pool.hash_block_size :]:
            for group in range(len(self.groups)):
                self._forget(make_block_hash_with_group_id(private, group))

    def dismiss(self, request: Request, start: int) -> None:
        """As `forget`, for a request that has ended: no event names its private hashes any more."""
        self.forget(request, start)
        self.events.forget(request.block_hashes[start // self.pool.hash_block_size :])

    def _forget(self, key: BlockHashWithGroupId) -> None:
        cached, more = self.pool.cached_block_hash_to_block, self.pool.cached_block_hashes_by_block
        while (block := cached.get_one_block(key)) is not None:
            cached.pop(key, block.block_id)
            others = more.get(block.block_id, set())
            others.discard(key)
            if block.block_hash == key:
                tokens = block.block_hash_num_tokens
                block.reset_hash()
                if others:  # vLLM takes a page without a hash of its own for one of no further use
                    block.set_block_hash(others.pop(), num_tokens=tokens)
            if not others:
                more.pop(block.block_id, None)

    def of(self, request_ids: Iterable[str]) -> dict[str, tuple[list[int], ...]]:
        """The pages of requests, by request and group."""
        return {
            request_id: tuple(
                [block.block_id for block in group.req_to_blocks.get(request_id, ())] for group in self.groups
            )
            for request_id in request_ids
        }

    def shared_pages(self, first: int = 0, end: int | None = None) -> Counter[int]:
        """Number of pages by how many table entries read them, from 1 up; of the pages `first` to `end` of the pool."""
        pages = self.pool.blocks[first:end]
        return Counter(block.ref_cnt for block in pages if block.ref_cnt and not block.is_null)

    def check_integrity(self) -> None:
        """Raises IntegrityError when reference counts are not the number of table entries, or a page is free and used.

        Only right between steps and without blocks retained by copy-on-write.
        """
        entries = Counter(
            block.block_id
            for group in self.groups
            for blocks in group.req_to_blocks.values()
            for block in blocks
            if not block.is_null
        )
        entries.update(block.block_id for _, blocks in self.kept for block in blocks)
        entries.update(self.held)
        entries.update(self.lent)
        for block in self.pool.blocks:
            if not block.is_null and block.ref_cnt != entries[block.block_id]:
                raise IntegrityError(
                    f"page {block.block_id} has {block.ref_cnt} references and {entries[block.block_id]} entries"
                )
        free = {block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()}
        if free & set(entries):
            raise IntegrityError(f"pages {sorted(free & set(entries))[:4]} are free and referenced")
        if len(free) + len(entries) + 1 != self.pool.num_gpu_blocks:
            raise IntegrityError("free and used pages do not add up to the pool")
