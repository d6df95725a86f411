"""The scheduler's part: which blocks to compare, which verdicts to carry out. It owns the truth."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from jointkv.errors import IntegrityError
from jointkv.fusion.token_index import TokenIndex
from jointkv.theory.adapt import Adaptation
from jointkv.theory.calibrate import TOKEN_SLACK
from jointkv.vllm_plugin.engine.steps import pages_to_write, resumed
from jointkv.vllm_plugin.engine.tables import BlockTables
from jointkv.vllm_plugin.messages import Inquiry, Remap, Verdict
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest, isolation_key, takes_part
from jointkv.vllm_plugin.settings import PluginSettings

logger = init_logger(f"vllm.{__name__}")

PATIENCE = 16
"""Steps that the verdict on one may take. vLLM schedules two steps ahead at the most."""
BOUNDS = ("max_relative_error", "max_token_error")


@dataclass
class Member:
    """A newly filled block that was sent to be compared, as it stood then.

    Attributes:
        candidates: resident pages it is compared with in this step.
        tried: those it was compared with before, in vain.
    """

    tracked: TrackedRequest
    epoch: int
    group: int
    slot: int
    page: int
    buckets: tuple[Hashable, ...]
    candidates: list[int]
    tried: tuple[int, ...] = ()


class FusionScheduler:
    """Asks the workers about newly filled blocks and, one verdict later, frees the duplicates.

    Args:
        settings: see `PluginSettings`.
        manager: vLLM's; its block tables and pool are what is changed.
        fused_groups: KV-cache groups that take part, by number.
    """

    def __init__(self, settings: PluginSettings, manager: KVCacheManager, fused_groups: Iterable[int]) -> None:
        self.settings = settings
        self.tables = BlockTables(manager)
        self.index = TokenIndex()
        self.statistics = Statistics()
        self.enabled = settings.enabled
        self._fused_groups = tuple(fused_groups)
        profile = settings.load_profile()
        self.adaptation: Adaptation | None = None
        if profile is not None and settings.adapts:
            self.adaptation = Adaptation(profile, settings.max_relative_error, settings.max_token_error)
        policy = settings.policy()
        self._bounds = [
            [np.inf if bound is None else bound for bound in (policy.threshold(name, group) for name in BOUNDS)]
            for group in range(len(self._fused_groups))
        ]
        self._block_size = self.tables.groups[self._fused_groups[0]].block_size
        self._chunk_blocks = settings.chunk_tokens // self._block_size
        self._requests: dict[str, TrackedRequest] = {}
        self._left_alone: dict[str, TrackedRequest] = {}
        self._step = 0
        self._written = np.zeros(self.tables.pool.num_gpu_blocks, np.int64)
        self._hash_map = self.tables.pool.cached_block_hash_to_block
        self._asked: dict[int, list[Member]] = {}
        self._again: list[Member] = []
        self._remaps: list[Remap] = []

    def admit(self, request: Request) -> None:
        """Take note of a new request."""
        if self.enabled and takes_part(request):
            self._requests[request.request_id] = TrackedRequest(request, isolation_key(request))

    def dismiss(self, request_id: str) -> None:
        """Forget a request that has finished or was aborted. Its pages stay resident until they are reused."""
        tracked = self._requests.pop(request_id, None) or self._left_alone.pop(request_id, None)
        if tracked is not None and tracked.private_from is not None:
            self.tables.forget(tracked.request, tracked.private_from)

    def next_inquiry(self) -> Inquiry:
        """The message of the next step: its number and the remaps committed since the last one. Asks nothing yet."""
        self._step += 1
        remaps, self._remaps = self._remaps, []
        return Inquiry(self._step, remaps)

    def ask(self, inquiry: Inquiry, output: SchedulerOutput) -> None:
        """Add to `inquiry` what the workers shall compare after the step that `output` describes."""
        if self.settings.check_integrity:
            inquiry.tables = self._tables_of(output)
        self._forget_computed_again(output)
        if not self.enabled:
            return
        self._forget_if_reset()
        self._forget_written(output)
        self._expect_none_before(inquiry.step - PATIENCE)
        members = list(self._members_again())
        if self._requests and self.tables.pool.get_usage() >= self.settings.min_pool_usage:
            members.extend(self._new_members(output))
        if members:
            self._asked[inquiry.step] = members
            pairs = [(member.group, member.page, page) for member in members for page in member.candidates]
            inquiry.group, inquiry.own, inquiry.other = np.array(pairs, np.int64).T

    def settle(self, verdict: Verdict) -> None:
        """Carry out what a verdict allows. Proposals whose blocks have changed since are dropped.

        So is a verdict on what was never asked, or is no longer to be done: it came twice, or fusion was off meanwhile.

        Raises:
            LayoutError, IntegrityError: see `Verdict.check`.
            RuntimeError: the verdict before this one was lost.
        """
        members = self._asked.pop(verdict.step, None)
        if members is None:
            return
        self._expect_none_before(verdict.step)
        verdict.check(sum(len(member.candidates) for member in members))
        self.statistics.add("compare_seconds", verdict.seconds)
        self.statistics.add("apply_seconds", verdict.apply_seconds)
        first = 0
        for member in members:
            last = first + len(member.candidates)
            self._settle(member, verdict, slice(first, last))
            first = last

    def disable(self) -> None:
        """Fuse nothing until `enable`. What is shared stays shared; remaps already committed are still sent.

        Requests that run now are left alone for good, but their private hashes are still to be forgotten.
        """
        self.enabled = False
        self._left_alone.update(self._requests)
        self._requests = {}
        # Anew, because the old ones may be what is broken.
        self.index, self._asked, self._again = TokenIndex(), {}, []

    def enable(self) -> None:
        """Fuse requests that are admitted from now on, if the settings allow any fusion."""
        self.enabled = self.settings.enabled

    def reset(self) -> None:
        """Forget all resident pages, because their content is no longer what the model would compute."""
        self.index.clear()
        self._asked.clear()
        self._again.clear()

    def check_integrity(self) -> None:
        """Raises IntegrityError when tables, reference counts or the index are inconsistent."""
        self.tables.check_integrity()
        self.index.check_integrity()
        if self.adaptation is not None:
            self.adaptation.check_integrity()
        for request_id, tracked in self._requests.items():
            if tracked.epoch == tracked.request.num_preemptions:
                for group, slot in tracked.served:
                    if self.tables.block(request_id, group, slot) is None:
                        raise IntegrityError(f"{request_id} is served at slot {slot}, which it does not hold")

    def _expect_none_before(self, step: int) -> None:
        """Verdicts come in the order of the inquiries. Raises RuntimeError when there is none on one before `step`."""
        oldest = next(iter(self._asked), step)
        if oldest < step:
            raise RuntimeError(f"the verdict of step {oldest} is lost")

    def _members_again(self) -> Iterator[Member]:
        """Members whose first candidates were not within the bounds, with the others that are still resident."""
        again, self._again = self._again, []
        for member in again:
            member.candidates = [page for page in member.candidates if page in self.index]
            if member.candidates:
                yield member
            else:
                self.statistics.reject("representative_gone")

    def _new_members(self, output: SchedulerOutput) -> Iterator[Member]:
        """Newly filled blocks that a resident page may serve. Those that none may serve become resident."""
        for tracked, group, slot, buckets in self._new_blocks(output):
            block = self.tables.block(tracked.request.request_id, group, slot)
            if block is None or block.is_null or block.block_id in self.index or (group, slot) in tracked.served:
                continue
            self.statistics.add("blocks_considered")
            candidates = self.index.candidates(buckets, self.settings.max_candidates)
            if not candidates:
                self.index.add(buckets, block.block_id)
                self._observe(tracked, group, slot, [])
            elif block.ref_cnt > 1:  # an exact prefix that others hold too: replacing one entry would free nothing
                self.statistics.reject("page_shared")
            else:
                yield Member(tracked, tracked.epoch, group, slot, block.block_id, buckets, candidates)

    def _new_blocks(self, output: SchedulerOutput) -> Iterator[tuple[TrackedRequest, int, int, tuple[Hashable, ...]]]:
        """Blocks that will be full after this step and were not looked at: request, group, slot and buckets."""
        budget = self.settings.max_blocks_per_step
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            request = tracked.request
            if request.num_preemptions != tracked.epoch:
                tracked.restart(request.num_computed_tokens // self._block_size)
            # With asynchronous scheduling the last tokens are placeholders: their text is not known yet.
            filled = min(request.num_computed_tokens + scheduled, request.num_tokens) // self._block_size
            end = min(filled, tracked.next_slot + budget)
            if end <= tracked.next_slot:
                continue
            slots = range(tracked.next_slot, end)
            budget -= len(slots)
            if self.settings.isolation == "strict" and not request.cache_salt:  # vLLM takes an empty salt for none
                tracked.next_slot = end
                self.statistics.add("isolation_refusals", len(slots))
                continue
            for slot, tokens in zip(slots, tracked.take_hashes(end, self._block_size), strict=True):
                for group in self._fused_groups:
                    yield tracked, group, slot, self._buckets(tracked, group, slot, tokens)

    def _buckets(self, tracked: TrackedRequest, group: int, slot: int, tokens: int) -> tuple[Hashable, ...]:
        buckets: list[Hashable] = []
        if self.settings.scope != "chunk":
            buckets.append((tracked.isolation, group, slot, tokens))
        if self.settings.scope != "batch":
            owner = tracked.request.request_id, tracked.epoch
            buckets.append((owner, group, slot % self._chunk_blocks, tokens))
        return tuple(buckets)

    def _settle(self, member: Member, verdict: Verdict, pairs: slice) -> None:
        request = member.tracked.request
        reason = self.tables.may_replace(request, member.epoch, member.group, member.slot, member.page)
        if reason is not None:
            self.statistics.reject(reason)
            return
        worst = np.maximum(verdict.key_error, verdict.value_error)[pairs]
        token = verdict.token_error[pairs]
        allowed = np.flatnonzero(verdict.accepted[pairs] & self._within_bounds_in_force(member, worst, token))
        for choice in allowed[worst[allowed].argsort(kind="stable")]:
            page = member.candidates[choice]
            if self._written[page] <= verdict.step:
                self._merge(
                    member, page, verdict.step, pairs.start + int(choice), max(worst[choice], token[choice]) == 0
                )
                self.statistics.merged(float(worst[choice]))
                self._observe(
                    member.tracked, member.group, member.slot, [float(max(worst[choice], token[choice] / TOKEN_SLACK))]
                )
                return
        if len(allowed):
            self.statistics.reject("representative_gone")
        else:
            self._turn_down(member)

    def _within_bounds_in_force(self, member: Member, block: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Which errors are within the bounds, of which adaptation may have left less than the workers know."""
        group = self._fused_groups.index(member.group)
        block_bound, token_bound = self._bounds[group] if self.adaptation is None else self.adaptation.bounds(group)
        return (block <= block_bound) & (token <= token_bound)

    def _observe(self, tracked: TrackedRequest, number: int, slot: int, errors: list[float]) -> None:
        """Tell adaptation of a block of a prompt, in KV-cache group `number`: served by another's page, or not.

        Blocks of answers are left out, as in calibration.
        """
        if self.adaptation is None or (slot + 1) * self._block_size > tracked.request.num_prompt_tokens:
            return
        group = self._fused_groups.index(number)
        move = self.adaptation.observe(group, 1, errors)
        if move is not None:
            logger.info(self.adaptation.describe(group, move))
            self.statistics.add("bounds_tightened" if move.direction == "tighten" else "bounds_loosened")

    def _merge(self, member: Member, page: int, step: int, pair: int, exact: bool) -> None:
        tracked, start = member.tracked, member.slot * self._block_size
        entry, private_from = (tracked.request.request_id, member.group, member.slot), tracked.private_from
        new = not exact and (private_from is None or start < private_from)
        if self.tables.prefix_caching and new:
            # Before anything else: what follows is for others no longer what its text stands for.
            self.tables.make_private(tracked.request, start, private_from, tracked.secret)
            tracked.private_from = start
        try:
            self.tables.replace(*entry, page)
        finally:  # whatever goes wrong, the workers' tables must follow the scheduler's
            block = self.tables.block(*entry)
            if block is not None and block.block_id == page:
                self._remaps.append(Remap(*entry, page, step, pair))
        if tracked.private_from is not None and start >= tracked.private_from:
            self.tables.answer_for(tracked.request, start, private_from if new else start + self._block_size)
        self.index.prefer(page)
        tracked.served.add((member.group, member.slot))

    def _turn_down(self, member: Member) -> None:
        """No candidate is within the bounds: try those that became resident meanwhile, once, or become resident."""
        tried = (*member.tried, *member.candidates)
        found = self.index.candidates(member.buckets, self.settings.max_candidates + len(tried))
        untried = [page for page in found if page not in tried]
        if untried and not member.tried:
            member.candidates, member.tried = untried[: self.settings.max_candidates], tried
            self._again.append(member)
            return
        self.statistics.reject("bound")
        self._observe(member.tracked, member.group, member.slot, [])
        if member.page not in self.index:  # another request that hits it may have made it resident meanwhile
            self.index.add(member.buckets, member.page)

    def _forget_written(self, output: SchedulerOutput) -> None:
        """Pages that this step hands out and will write leave the index before any worker can write them."""
        for page in pages_to_write(output, self._block_size):
            self.index.remove(page)
            self._written[page] = self._step

    def _forget_computed_again(self, output: SchedulerOutput) -> None:
        """Private hashes of blocks that a resumed request did not find again lead to its own pages from now on.

        The page that served such a block before may still be there, and its hash would lead to it: a page that the
        request now reads as it stands, whatever factors it had.
        """
        for request_id, computed in resumed(output):
            tracked = self._requests.get(request_id) or self._left_alone.get(request_id)
            if tracked is not None and tracked.private_from is not None:
                start = max(tracked.private_from, computed // self._block_size * self._block_size)
                self.tables.forget(tracked.request, start)
                self.tables.answer_for(tracked.request, start, None)

    def _forget_if_reset(self) -> None:
        """vLLM empties its prefix cache when old pages must no longer be used, for example for new weights."""
        if self.tables.pool.cached_block_hash_to_block is not self._hash_map:
            self._hash_map = self.tables.pool.cached_block_hash_to_block
            self.reset()

    def _tables_of(self, output: SchedulerOutput) -> dict[str, tuple[list[int], ...]]:
        return {
            request_id: tuple(
                [block.block_id for block in group.req_to_blocks.get(request_id, ())] for group in self.tables.groups
            )
            for request_id in output.num_scheduled_tokens
        }
