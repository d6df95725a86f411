"""Where newly filled blocks meet resident ones: same tokens, same position, same isolation key."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from vllm.v1.core.sched.output import SchedulerOutput

from jointkv.fusion.token_index import Bucket, places
from jointkv.vllm_plugin.engine.steps import pages_to_write
from jointkv.vllm_plugin.engine.tables import BlockTables
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.evidence import Audit
from jointkv.vllm_plugin.scheduler.requests import Requests, TrackedRequest
from jointkv.vllm_plugin.scheduler.residents import Residents
from jointkv.vllm_plugin.settings import PluginSettings


@dataclass
class Member:
    """A newly filled block as it stood when it was looked up.

    Attributes:
        candidates: resident pages that may serve it.
        fuses: whether one of them may; else they are compared for an audit alone.
        audit: gets to know how far they are.
        tried: those it was compared with before, in vain.
    """

    tracked: TrackedRequest
    epoch: int
    group: int
    slot: int
    page: int
    buckets: tuple[Bucket, ...]
    candidates: list[int]
    fuses: bool = True
    audit: Audit | None = None
    tried: tuple[int, ...] = ()

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
        statistics: Statistics,
    ) -> None:
        self._settings, self._tables, self._groups = settings, tables, groups
        self._requests, self._statistics = requests, statistics
        self._block_size = tables.groups[groups[0]].block_size
        self.residents = Residents(tables.pool.num_gpu_blocks, self._block_size, settings.reuses)
        self._chunk_blocks = settings.chunk_tokens // self._block_size
        self._written = np.zeros(tables.pool.num_gpu_blocks, np.int64)
        self._hash_map = tables.pool.cached_block_hash_to_block

    def new_members(self, output: SchedulerOutput) -> Iterator[Member]:
        """Blocks that will be full after this step and were not looked at, with candidates or with none."""
        fuses = self._tables.pool.get_usage() >= self._settings.min_pool_usage
        if not self._requests.active or not (fuses or self._settings.reuses):
            return
        for tracked, group, slot, buckets in self._new_blocks(output):
            tracked.tried |= fuses
            block = self._tables.block(tracked.request.request_id, group, slot)
            if block is None or block.is_null or block.block_id in self.residents or (group, slot) in tracked.served:
                continue
            member = Member(tracked, tracked.epoch, group, slot, block.block_id, buckets, [], fuses)
            self._look_up(member)
            if member.candidates and member.audit is None and block.ref_cnt > 1:
                # Others hold it as an exact prefix: replacing one entry frees nothing.
                self._statistics.reject("page_shared")
            else:
                yield member

    def still_resident(self, member: Member) -> bool:
        """Keep the candidates of `member` that are; whether there are any."""
        member.candidates = [page for page in member.candidates if page in self.residents]
        return bool(member.candidates)

    def try_others(self, member: Member) -> bool:
        """Give `member` the candidates that became resident while it was compared, once; whether there are any."""
        tried = (*member.tried, *member.candidates)
        found = self.residents.index.candidates(member.buckets, self._settings.max_candidates + len(tried))
        untried = [page for page in found if page not in tried]
        if member.tried or not untried:
            return False
        member.candidates, member.tried = untried[: self._settings.max_candidates], tried
        return True

    def make_resident(self, member: Member) -> None:
        """Offer the page of `member` to others; another request that hits it may have done so meanwhile."""
        if member.page not in self.residents:
            self.residents.add(member.tracked, member.slot, member.page, member.buckets)

    def unchanged_since(self, page: int, step: int) -> bool:
        """Whether `page` was not handed out again after `step`."""
        return bool(self._written[page] <= step)

    def forget_written(self, output: SchedulerOutput, step: int) -> None:
        """Pages that `step` hands out and will write leave the index before any worker can write them."""
        for page in pages_to_write(output, self._block_size):
            self.residents.remove(page)
            self._written[page] = step

    def cache_was_reset(self) -> bool:
        """Whether vLLM has emptied its prefix cache since the last call: old pages must not be used any more."""
        before, self._hash_map = self._hash_map, self._tables.pool.cached_block_hash_to_block
        return before is not self._hash_map

    def start_anew(self) -> None:
        """Forget every resident page."""
        self.residents.clear()

    def _look_up(self, member: Member) -> None:
        """Give `member` the pages that it is compared with, and the audit that learns from it."""
        tracked, slot = member.tracked, member.slot
        # What was computed behind another's page is no evidence of what the model computes.
        audit = tracked.audit if member.of_prompt and tracked.private_from is None else None
        if member.fuses or audit is not None:
            self._statistics.add("blocks_considered")
            named = [] if audit is None else audit.pages.get(slot, [])
            # By now a page that was named may be resident with other text.
            same = self.residents.index.candidates(member.buckets[:1], len(self._written))
            known = [page for page in same if page in named]
            member.candidates = known or self.residents.index.candidates(member.buckets, self._settings.max_candidates)
            member.audit = audit if member.candidates else None

    def _new_blocks(self, output: SchedulerOutput) -> Iterator[tuple[TrackedRequest, int, int, tuple[Bucket, ...]]]:
        """Request, group, slot and buckets of blocks that count as looked at from now on."""
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
            end = max(min(filled, tracked.next_slot + budget), tracked.next_slot)
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
                    yield tracked, group, slot, tuple(((owner, group), place) for owner, place in at)

    def _places(self, tracked: TrackedRequest, slots: NDArray[np.int64]) -> Iterator[list[tuple[Hashable, int]]]:
        """For each scope that counts, whose pages may serve the blocks `slots [n]`, and at which place each."""
        hashes = tracked.hashes(int(slots.max()) + 1)[slots]
        if self._settings.scope != "chunk":
            yield [(tracked.isolation, place) for place in places(hashes, slots)]
        if self._settings.scope != "batch":
            owner = tracked.request.request_id, tracked.epoch
            yield [(owner, place) for place in places(hashes, slots % self._chunk_blocks)]
