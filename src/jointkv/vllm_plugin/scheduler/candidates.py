"""Where newly filled blocks meet resident ones: same tokens or like content, same position, same isolation key."""

from __future__ import annotations

import time
from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from vllm.v1.core.sched.output import SchedulerOutput

from jointkv.core.moved_text import UNWRITTEN
from jointkv.fusion.token_index import Bucket, places
from jointkv.vllm_plugin.engine.steps import pages_to_write
from jointkv.vllm_plugin.engine.tables import BlockTables
from jointkv.vllm_plugin.messages import Pair
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.bounds import Bounds
from jointkv.vllm_plugin.scheduler.evidence import Audit
from jointkv.vllm_plugin.scheduler.requests import Requests, TrackedRequest
from jointkv.vllm_plugin.scheduler.residents import Residents
from jointkv.vllm_plugin.settings import PluginSettings

Place = tuple[Hashable, int, int]
"""Whose pages may serve a block, its group, and its position among them."""

SEARCHES = 4
"""A block that the pages found by its signature may not serve is searched again among others, this often in all."""


@dataclass
class Member:
    """A newly filled block as it stood when it was looked up.

    Attributes:
        written: the step that handed its page out.
        buckets: where pages of the same text are found.
        places: where pages are found by their signatures.
        candidates: resident pages that may serve it.
        moved: what is compared for an audit besides, of text at other positions, by numbers of pages to be written.
        fuses: whether one of them may; else they are compared for an audit alone.
        audit: gets to know how far they are.
        tried: those it was compared with before, in vain.
        signature: what its page was found to hold, float32 `[size]`; None where it was not signed.
    """

    tracked: TrackedRequest
    epoch: int
    group: int
    slot: int
    page: int
    written: int
    buckets: tuple[Bucket, ...]
    places: tuple[Place, ...]
    candidates: list[int] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    fuses: bool = True
    audit: Audit | None = None
    tried: tuple[int, ...] = ()
    signature: NDArray[np.float32] | None = None

    @property
    def pairs(self) -> list[Pair]:
        """What is to be compared with its block."""
        still = [Pair(self.group, self.page, page) for page in self.candidates]
        text = None if self.audit is None else self.audit.text
        return still if text is None else still + [text.pair(self.group, self.page, page) for page in self.moved]

    @property
    def position(self) -> int:
        """Equal for all blocks that it may be like: of the block in its request, or in its chunk."""
        return self.places[-1][-1]  # of several the last is that in a chunk

    @property
    def of_prompt(self) -> bool:
        """Whether all its tokens are the client's."""
        request = self.tracked.request
        return (self.slot + 1) * self.tracked.block_size <= request.num_prompt_tokens


class Candidates:
    """Finds newly filled blocks and the resident pages that may serve them. A page leaves before it is written.

    Args:
        settings: scope, isolation and how many to look at.
        tables: vLLM's.
        groups: KV-cache groups that take part, by number.
        requests: those that take part.
        bounds: say how far apart signatures may be.
        statistics: counts what is looked at.

    Attributes:
        residents: those pages.
    """

    def __init__(
        self,
        settings: PluginSettings,
        tables: BlockTables,
        groups: tuple[int, ...],
        requests: Requests,
        bounds: Bounds,
        statistics: Statistics,
    ) -> None:
        self._settings, self._tables, self._groups = settings, tables, groups
        self._requests, self._bounds, self._statistics = requests, bounds, statistics
        self._block_size = tables.groups[groups[0]].block_size
        self.residents = Residents(
            tables.pool.num_gpu_blocks, self._block_size, settings.reuses, settings.signature_size, settings.moves
        )
        self._chunk_blocks = settings.chunk_tokens // self._block_size
        self._written = np.zeros(tables.pool.num_gpu_blocks, np.int64)
        self._hash_map = tables.pool.cached_block_hash_to_block

    def new_members(self, output: SchedulerOutput) -> Iterator[Member]:
        """Blocks that will be full after this step and were not looked at, with candidates or with none."""
        fuses = self._tables.pool.get_usage() >= self._settings.min_pool_usage
        if not self._requests.active or not (fuses or self._settings.reuses):
            return
        for tracked, group, slot, buckets, at in self._new_blocks(output):
            tracked.tried |= fuses
            block = self._tables.block(tracked.request.request_id, group, slot)
            if block is None or block.is_null or block.block_id in self.residents or (group, slot) in tracked.served:
                continue
            page, written = block.block_id, int(self._written[block.block_id])
            member = Member(tracked, tracked.epoch, group, slot, page, written, buckets, at, fuses=fuses)
            self._look_up(member)
            if member.candidates and member.audit is None and block.ref_cnt > 1:
                # Others hold it as an exact prefix: replacing one entry frees nothing.
                self._statistics.reject("page_shared")
            else:
                yield member

    def still_resident(self, member: Member) -> bool:
        """Keep the candidates of `member` that are, and may serve it still; whether there are any."""
        by_text = member.signature is None
        member.candidates = [
            page for page in member.candidates if page in self.residents and (by_text or self._in_use(page))
        ]
        return bool(member.candidates)

    def try_others(self, member: Member) -> bool:
        """Give `member` the candidates that became resident while it was compared; whether there are any.

        Those of the same text once, by signatures a few times.
        """
        count, tried = self._settings.max_candidates, (*member.tried, *member.candidates)
        if member.signature is not None:
            untried = [] if len(tried) >= SEARCHES * count else self._near(member, tried)
        else:
            found = [] if member.tried else self.residents.index.candidates(member.buckets, count + len(tried) + 1)
            # Who holds the page of `member` as well, as an exact prefix, may have made it resident meanwhile.
            untried = [page for page in found if page != member.page and page not in tried][:count]
        if untried:
            member.candidates, member.tried = untried, tried
        return bool(untried)

    def search(self, member: Member) -> None:
        """Give `member`, which is signed, resident pages in use that hold what its page holds, or nearly."""
        member.candidates = self._near(member, ())

    def make_resident(self, member: Member) -> None:
        """Offer the page of `member` to others; another request that hits it may have done so meanwhile."""
        if member.page not in self.residents:
            self.residents.add(member.tracked, member.slot, member.page, member.buckets)
        if member.signature is not None and member.page not in self.residents.signatures:
            self.residents.signatures.add(member.places, member.page, member.signature)

    def give_up(self, member: Member) -> None:
        """The page of `member` is given back to the pool: who is alike shall find the one that serves."""
        self.residents.remove(member.page)

    def unchanged(self, member: Member) -> bool:
        """Whether the page of `member` was not handed out again."""
        return bool(self._written[member.page] == member.written)

    def unchanged_since(self, page: int, step: int) -> bool:
        """Whether `page` was not handed out again after `step`."""
        return bool(self._written[page] <= step)

    def may_serve(self, member: Member, page: int, step: int) -> bool:
        """Whether `page` holds what it held after `step`, and is worth reading: see `search`."""
        there = self.unchanged_since(page, step) and page in self.residents
        return there and (member.signature is None or self._in_use(page))

    def forget_given(self, pages: Iterable[Sequence[int]], found: int, step: int) -> None:
        """Of `pages`, by group, that a request holds which starts in `step`, those behind the first `found` tokens."""
        self._forget((page for group in pages for page in group[found // self._block_size :]), step)

    def forget_written(self, output: SchedulerOutput, step: int) -> None:
        """Pages that `step` gives to running requests leave the index before any worker can write them."""
        self._forget(pages_to_write(output), step)

    def _forget(self, pages: Iterable[int], step: int) -> None:
        for page in pages:
            self.residents.remove(page)
            self._written[page] = step

    def note_written(self, pages: Iterable[int], step: int) -> None:
        """`pages` were written before `step` with text from elsewhere; they have left the index before that."""
        for page in pages:
            self._written[page] = step

    def cache_was_reset(self) -> bool:
        """Whether vLLM has emptied its prefix cache since the last call: old pages must not be used any more."""
        before, self._hash_map = self._hash_map, self._tables.pool.cached_block_hash_to_block
        return before is not self._hash_map

    def start_anew(self) -> None:
        """Forget every resident page."""
        self.residents.clear()

    def _in_use(self, page: int) -> bool:
        return bool(self._tables.pool.blocks[page].ref_cnt)

    def _near(self, member: Member, tried: Container[int]) -> list[int]:
        """Pages in use that no request could be given anew; of those that are free the signatures leave the index."""
        found: list[int] = []
        assert member.signature is not None
        start, signatures = time.perf_counter(), self.residents.signatures
        for page in signatures.near(member.places, member.signature, self._bounds.signature_limit(member.group)):
            if not self._in_use(page):
                signatures.remove(page)
            elif page != member.page and page not in tried:
                found.append(page)
                if len(found) == self._settings.max_candidates:
                    break
        self._statistics.add("blocks_searched")
        self._statistics.add("search_seconds", time.perf_counter() - start)
        return found

    def _look_up(self, member: Member) -> None:
        """Give `member` the pages that it is compared with, and the audit that learns from it."""
        tracked, slot = member.tracked, member.slot
        # What was computed behind another's page is no evidence of what the model computes.
        audit = tracked.audit if member.of_prompt and tracked.private_from is None else None
        if member.fuses or audit is not None:
            self._statistics.add("blocks_considered")
            named = [] if audit is None else audit.pages.get(slot, [])
            # By now a page that was named may be resident with other text.
            known = [page for page in named if self.residents.index.holds(member.buckets[0], page)]
            member.candidates = known or self._by_text(member)
            if audit is not None and audit.text is not None:
                numbers = np.array([page for page in named if page >= UNWRITTEN], np.int64)
                member.moved = numbers[audit.text.can_be_written(numbers)].tolist() if len(numbers) else []
            member.audit = audit if member.candidates or member.moved else None

    def _by_text(self, member: Member) -> list[int]:
        if self._settings.candidates == "signature":
            return []
        return self.residents.index.candidates(member.buckets, self._settings.max_candidates)

    def _new_blocks(
        self, output: SchedulerOutput
    ) -> Iterator[tuple[TrackedRequest, int, int, tuple[Bucket, ...], tuple[Place, ...]]]:
        """Request, group, slot, buckets and places of blocks that count as looked at from now on."""
        budget = self._settings.max_blocks_per_step
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._requests.active.get(request_id)
            if tracked is None:
                continue
            request = tracked.request
            if request.num_preemptions != tracked.epoch:
                tracked.restart(request.num_computed_tokens // self._block_size)
            # With asynchronous scheduling the last tokens are placeholders: their text is not known yet.
            filled = min(request.num_computed_tokens + scheduled, request.num_tokens) // self._block_size
            # A request that was drawn for an audit may end with this step: audits of long prompts would be dropped.
            drawn = tracked.audit is not None and tracked.audit.chosen
            end = max(filled if drawn else min(filled, tracked.next_slot + budget), tracked.next_slot)
            slots = [*tracked.late, *range(tracked.next_slot, end)]
            tracked.late = []
            if not slots:
                continue
            budget -= len(slots)
            if self._settings.isolation == "strict" and not request.cache_salt:  # vLLM takes an empty salt for none
                tracked.next_slot = end
                self._statistics.add("isolation_refusals", len(slots))
                continue
            tracked.next_slot = end
            for slot, *at in zip(slots, *self._places(tracked, np.array(slots)), strict=True):
                for group in self._groups:
                    buckets = tuple(((owner, group), place) for owner, place, _ in at)
                    yield tracked, group, slot, buckets, tuple((owner, group, position) for owner, _, position in at)

    def _places(self, tracked: TrackedRequest, slots: NDArray[np.int64]) -> Iterator[list[tuple[Hashable, int, int]]]:
        """For each scope that counts, whose pages may serve the blocks `slots [n]`, and place and position of each."""
        hashes = tracked.hashes(int(slots.max()) + 1)[slots]
        owners: list[tuple[Hashable, NDArray[np.int64]]] = []
        if self._settings.scope != "chunk":
            owners.append((tracked.isolation, slots))
        if self._settings.scope != "batch":
            owners.append(((tracked.request.request_id, tracked.epoch), slots % self._chunk_blocks))
        for owner, positions in owners:
            named = zip(places(hashes, positions), positions.tolist(), strict=True)
            yield [(owner, place, position) for place, position in named]
