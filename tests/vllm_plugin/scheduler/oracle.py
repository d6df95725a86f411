"""What must hold of a scheduler, its tables, prefix cache and index, worked out from requests and pages alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from copy import copy
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id
from vllm.v1.request import Request, RequestStatus

from jointkv.vllm_plugin.engine.others import ours
from jointkv.vllm_plugin.engine.pages import NULL_PAGE
from jointkv.vllm_plugin.engine.steps import started
from tests.vllm_plugin.scheduler.account import Account
from tests.vllm_plugin.scheduler.directions_oracle import Directions
from tests.vllm_plugin.scheduler.fake_pages import Block, Model, own_norm, within_bounds
from tests.vllm_plugin.scheduler.fake_worker import Runner
from tests.vllm_plugin.scheduler.index_oracle import Index

ABORTED = "abort"


class Oracle:
    """Follows every request of an engine, and checks its scheduler and runner against what it has seen.

    Args:
        model: as the worker has it.

    Attributes:
        totals: what happened: steps, merges, hits, ...
        expected_faults: what is said when fusion switches itself off for a reason that a test has made.
        aborting: names of requests whose client is gone.
    """

    def __init__(self, model: Model, totals: Counter[str]) -> None:
        self.model = model
        self.totals = totals
        self.accounts: dict[str, Account] = {}
        self.expected_faults: set[str] = set()
        self.aborting: set[str] = set()
        self._promises: dict[bytes, tuple[Block, ...]] = {}
        self._starting: set[str] = set()

    def attach(self, core: Any, runner: Runner) -> None:
        """Follow this engine, before its first request."""
        self.scheduler = core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.groups = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.connector = ours(self.scheduler.connector)
        self.side = self.connector.scheduler
        self.settings = self.connector.settings
        self.policy = self.settings.fusion_policy()
        self.pages = runner.pages
        self.size = runner.pages.size
        replace = self.side.tables.replace

        def watched(name: str, group: int, slot: int, page: int) -> None:
            own = self.groups[group].req_to_blocks[name][slot]
            self._before_merging(self.accounts[name], group, slot, page)
            replace(name, group, slot, page)
            assert not own.ref_cnt, "a page that was given away is held"

        self.side.tables.replace = watched
        self.directions, self.index = Directions(self), Index(self)

    # What happens.

    def admit(self, request: Request) -> None:
        """A new request."""
        twin = copy(request)
        twin.block_hashes = []
        numbers = range(len(self.groups))
        account = Account(
            request, twin, [[] for _ in numbers], [[] for _ in numbers], [defaultdict(set) for _ in numbers]
        )
        self.accounts[request.request_id] = account
        self._promise(account)

    def begin(self, output: Any) -> None:
        """A worker's step: its tables are the scheduler's, and every block is read with its own norms."""
        self.totals["steps"] += 1
        for name in output.num_scheduled_tokens:
            for number, group in enumerate(self.groups):
                table = [block.block_id for block in group.req_to_blocks[name]]
                for found in ours(get_kv_transfer_group()).worker.tables.read(name, number, len(table)):
                    assert found == table, f"the worker's table of {name}, group {number}, is not the scheduler's"
        for name, count in started(output):
            # Beside other connectors a request finds nothing of what others' pages have served it.
            account, found = self.accounts[name], count // self.size * (self.scheduler.connector is self.connector)
            account.factors = {at: known for at, known in account.factors.items() if at[1] < found}
        self.directions.check_norms()
        self._starting = {name for name, _ in started(output)}
        self.totals["resumed"] += sum(self.accounts[name].request.num_preemptions > 0 for name in self._starting)

    def computed(self, name: str, first: int, numbers: list[list[int]]) -> None:
        """A worker has read the numbers of a request before token `first`, and written those from there on."""
        account = self.accounts[name]
        if name in self._starting:
            self._start(account, first // self.size, numbers)
        for group, (own, written) in enumerate(zip(account.own, numbers, strict=True)):
            assert sum(map(len, own)) == first, "tokens are computed twice or left out"
            self._check_read(account, group, written)
            for place in range(first, len(written)):
                if place % self.size == 0:
                    own.append([])
                own[-1].append(written[place])
                if len(own[-1]) == self.size:
                    account.ever[group][len(own) - 1].add(tuple(own[-1]))
            # With asynchronous scheduling the worker knows the last tokens before the scheduler does.
            known = min(len(written), len(account.exact[group]))
            if written[:known] != account.exact[group][:known]:
                assert self.may_be_inexact(account, first), f"{name} was never merged, but is not exact"

    def may_be_inexact(self, account: Account, first: int) -> bool:
        """Whether what a request computes from token `first` on may differ from what it would have computed alone."""
        return bool(account.ever_merged)

    def may_read(self, account: Account, group: int, slot: int, page: int) -> bool:
        """Whether a private hash of a request may lead to `page`."""
        block = self.pages.block(page)
        exact = tuple(account.exact[group][slot * self.size : (slot + 1) * self.size])
        return block == exact or account.may_read(group, slot, block, self.policy)

    def reads_in_place(self, account: Account, slot: int) -> Block | None:
        """What a request reads at a slot without a page; None if nothing."""
        return None

    @property
    def clients(self) -> list[Account]:
        """Requests of clients, in the order of arrival."""
        return list(self.accounts.values())

    def may_disappear(self, name: str) -> bool:
        """Whether a request may end without its last token."""
        return name in self.aborting

    def check_statistics(self, stats: Any) -> None:
        """What vLLM says of its requests."""
        assert stats.num_running_reqs + stats.num_waiting_reqs + stats.num_skipped_waiting_reqs == len(
            self.scheduler.requests
        )

    def salt(self, name: str) -> str | None:
        """Of a request."""
        return self.accounts[name].request.cache_salt

    def deliver(self, output: Any) -> None:
        """Tokens of a request go to its client."""
        account = self.accounts[output.request_id]
        assert account.ended is None, "tokens of a request that has ended"
        self._promise(account)
        account.delivered.extend(output.new_token_ids)
        if output.finish_reason is not None:
            account.ended = str(output.finish_reason)
            assert account.ended == "length", account.ended
            assert len(account.delivered) == account.request.max_tokens, "a request lost tokens"
            assert account.delivered == list(account.request.output_token_ids)
            self.totals["finished"] += 1

    def new_weights(self) -> None:
        """The prefix cache was emptied because the model changed: from now on nothing of before may be read."""
        self.model.version += 1
        self._promises.clear()
        for account in self.accounts.values():
            account.exact = [[] for _ in self.groups]
            account.own = [[] for _ in self.groups]
            for ever in account.ever:
                ever.clear()

    # What must hold.

    def check(self) -> None:
        """Raises AssertionError when anything is not as it must be."""
        live = [account for account in self.accounts.values() if account.ended is None]
        for account in live:
            self._promise(account)
        self._check_pool()
        for account in live:
            self._check_tables(account)
            tracked = self.side.requests.active.get(account.request.request_id)
            if tracked is not None and tracked.epoch == account.request.num_preemptions:
                assert tracked.served <= account.merged.keys(), "a block is said to be served that was computed"
        self._check_prefix_cache(live)
        self.index.check()
        self.directions.check()
        cause = self.connector.scheduler.recovery.cause
        assert cause is None or any(text in cause for text in self.expected_faults), cause
        self.side.check_integrity()

    def check_drained(self) -> None:
        """After the last request: nothing is held, nobody was lost, nothing private is left behind."""
        self.check()
        assert not self.scheduler.requests and not self.side.tables.held and not self.side.tables.lent
        assert all(account.ended for account in self.accounts.values()), "a request was lost"
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert not self.side.requests.active and not self.side.requests.left_alone
        assert not self.pool.cached_block_hashes_by_block

    def _before_merging(self, account: Account, group: int, slot: int, page: int) -> None:
        request = account.request
        assert not request.sampling_params.extra_args, "a request that opted out is merged"  # type: ignore[union-attr]
        assert request.cache_salt is not None or self.settings.isolation == "salt", "a request without a salt is merged"
        assert (group, slot) not in account.merged, "a served block is merged again"
        old = self.groups[group].req_to_blocks[request.request_id][slot].block_id
        assert self.pool.blocks[old].ref_cnt == 1, "a merge frees no page"
        assert list(self.pages.block(old)) == account.own[group][slot], "the page given away is not its own"
        account.merged[group, slot], account.generations[group, slot] = page, self.pages.generation[page]
        factor = own_norm(self.pages.block(old), self.pages.block(page))
        account.factors.pop((group, slot), None)
        if self.settings.own_norms and factor != 1:
            account.factors[group, slot] = factor
        account.ever_merged.add((group, slot))
        self.totals["merges"] += 1
        text = request.all_token_ids[slot * self.size : (slot + 1) * self.size]
        self.totals["merges of other text"] += [token for _, token in self.pages.text[page]] != text
        self.totals["approximate merges"] += self.pages.block(old) != self.pages.block(page)
        self.totals["merges of answers"] += (slot + 1) * self.size > request.num_prompt_tokens

    def _promise(self, account: Account) -> None:
        """Work out what the hashes of a request's text stand for."""
        tokens, twin = account.request.all_token_ids, account.twin
        self.model.extend(account.exact, tokens[len(account.exact[0]) :])
        twin.update_block_hashes()
        for number, key in enumerate(twin.block_hashes):
            if key not in self._promises:
                part = slice(number * self.size, (number + 1) * self.size)
                self._promises[key] = tuple(tuple(group[part]) for group in account.exact)

    def _start(self, account: Account, hits: int, numbers: list[list[int]]) -> None:
        """A request starts, or starts again: the first `hits` blocks of `numbers` are what it found."""
        self._promise(account)
        self.totals["hits"] += hits
        account.own = [[] for _ in self.groups]
        name = account.request.request_id
        account.merged = {
            (group, slot): self.groups[group].req_to_blocks[name][slot].block_id
            for group, slot in account.merged
            if slot < hits
        }
        account.generations = {at: self.pages.generation[page] for at, page in account.merged.items()}
        for slot in range(hits):
            exact = account.request.block_hashes[slot] == account.twin.block_hashes[slot]
            for group, read in enumerate(numbers):
                page = self.groups[group].req_to_blocks[name][slot].block_id
                part = slice(slot * self.size, (slot + 1) * self.size)
                block = tuple(read[part])
                if exact:
                    assert list(block) == account.exact[group][part], "an exact hash was answered by something else"
                    account.ever[group][slot].add(block)
                else:
                    self.totals["private hits"] += 1
                    assert self.may_read(account, group, slot, page), "a private hash was answered wrongly"
                account.own[group].append(list(block))

    def _check_read(self, account: Account, group: int, numbers: list[int]) -> None:
        """What a worker has read of a request, by `numbers`, is what the request has computed itself, or has merged."""
        for slot, mine in enumerate(account.own[group]):
            if numbers[slot * self.size : slot * self.size + len(mine)] == mine:
                continue
            name = account.request.request_id
            assert (group, slot) in account.merged, f"a worker reads for {name} what it has not computed"
            self._check_kept(account, group, slot)

    def _check_kept(self, account: Account, group: int, slot: int) -> None:
        """What a request reads from another's page is what it was when the two were merged."""
        page = account.merged[group, slot]
        assert account.generations[group, slot] == self.pages.generation[page], "a page that is read was written"

    def _check_pool(self) -> None:
        entries: Counter[int] = Counter()
        for group in self.groups:
            for name, blocks in group.req_to_blocks.items():
                assert not blocks or self.scheduler.requests[name].status == RequestStatus.RUNNING
                entries.update(block.block_id for block in blocks if not block.is_null)
        entries.update(block.block_id for _, blocks in self.scheduler.deferred_frees for block in blocks)
        held = self.side.tables.held
        assert not entries.keys() & held, "a page is read before what is written to it is verified"
        entries.update(held)
        entries.update(self.side.tables.lent)
        free = [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]
        assert len(free) == len(set(free)) == self.pool.get_num_free_blocks(), "the free queue is broken"
        assert not entries.keys() & set(free), "a page is free and referenced"
        assert len(free) + len(entries) == self.pool.num_gpu_blocks - 1, "a page is neither free nor used"
        for block in self.pool.blocks:
            assert block.is_null or block.ref_cnt == entries[block.block_id], "references are not table entries"

    def _check_tables(self, account: Account) -> None:
        """Every entry of a request reads what it computed itself, or after a merge something within the bounds."""
        request = account.request
        tokens = request.all_token_ids
        for number, (group, own) in enumerate(zip(self.groups, account.own, strict=True)):
            blocks = group.req_to_blocks.get(request.request_id, ())
            if not blocks:
                continue
            for slot, mine in enumerate(own):
                page = blocks[slot].block_id
                assert account.merged.get((number, slot), page) == page, "a request has left the page that it shares"
                if page == NULL_PAGE:
                    assert self.reads_in_place(account, slot) == tuple(mine), "what is read in place has changed"
                    continue
                assert self.pages.salts[page] == request.cache_salt, "salts share a page"
                found = self.pages.numbers[page][: len(mine)]
                if found == mine:
                    continue
                assert (number, slot) in account.merged, f"{request.request_id} reads what it has not computed"
                self._check_kept(account, number, slot)
                assert within_bounds(tuple(mine), tuple(found), self.policy), "a member is beyond its bound"
                start = self.pages.text[page][0][0]
                part = tokens[slot * self.size : (slot + 1) * self.size]
                same_text = [token for _, token in self.pages.text[page]] == part
                assert same_text or self.settings.finds_other_text, "a member reads other text"
                step = self.settings.chunk_tokens if self.settings.scope != "batch" else 1 << 30
                assert (start - slot * self.size) % step == 0, "a member reads another position"

    def _check_prefix_cache(self, live: list[Account]) -> None:
        """A page answers for the hash of a text only with what the text stands for, for others only to their owner."""
        cached, more = self.pool.cached_block_hash_to_block._cache, self.pool.cached_block_hashes_by_block
        private = {
            key: (account, slot)
            for account in live
            for slot, key in enumerate(account.request.block_hashes)
            if key != account.twin.block_hashes[slot]
        }
        listed = 0
        for key, pages in cached.items():
            group = get_group_id(key)
            promised = self._promises.get(get_block_hash(key))
            owner, slot = private.get(get_block_hash(key), (None, 0))
            for block in pages.values() if isinstance(pages, dict) else (pages,):
                page, listed = block.block_id, listed + 1
                assert block.block_hash == key or key in more.get(page, ()), "a page does not know its hash"
                if promised is not None:
                    assert self.pages.block(page) == promised[group], "an exact hash is answered by something else"
                elif owner is not None:
                    assert self.may_read(owner, group, slot, page), "a private hash is wrong"
                    assert page == NULL_PAGE or self.pages.salts[page] == owner.request.cache_salt
                    table = self.groups[group].req_to_blocks.get(owner.request.request_id, ())
                    right = not table or (group, slot) not in owner.merged or table[slot].block_id == page
                    assert right, "a page that was given away answers for a private hash"
                else:
                    raise AssertionError("a hash that nobody can look up was left behind")
        known = sum(block.block_hash is not None for block in self.pool.blocks) + sum(map(len, more.values()))
        assert known == listed, "a page has a hash that is not in the cache"
