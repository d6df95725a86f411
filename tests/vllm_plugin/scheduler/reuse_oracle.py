"""What must hold besides where text is reused before it is computed."""

from __future__ import annotations

from collections import defaultdict
from copy import copy
from functools import partial
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.vllm_plugin.engine.others import ours
from jointkv.vllm_plugin.engine.pages import NULL_PAGE
from tests.vllm_plugin.scheduler.account import Account
from tests.vllm_plugin.scheduler.fake_pages import Block
from tests.vllm_plugin.scheduler.oracle import Oracle

GROUP = 0


class ReuseOracle(Oracle):
    """See the module. Its totals also count helpers, adopted blocks, those of them that were read, and audits.

    Attributes:
        owners: by name of a helper, whom it helps.
    """

    def attach(self, *parts: Any) -> None:
        super().attach(*parts)
        self.owners: dict[str, str] = {}
        self._adopted: dict[str, dict[int, tuple[int, int]]] = {}
        self._behind: set[str] = set()
        adopt = self.side.sharing.adopt

        def watched(tracked: Any, group: int, first: int, pages: list[int]) -> None:
            self._before_adopting(self.accounts[tracked.request.request_id], first, pages)
            adopt(tracked, group, first, pages)

        self.side.sharing.adopt = watched
        self._measured: defaultdict[tuple[int, int], set[np.float32]] = defaultdict(set)
        """Error over bound of all that a page, as it was begun, was compared with."""
        self.pages.compared = self._note
        residents = self.side.candidates.residents
        for evidence in (residents.evidence, residents.evidence_moved):
            evidence.add = partial(self._before_testifying, evidence.add)

    @property
    def clients(self) -> list[Account]:
        return [account for name, account in self.accounts.items() if name not in self.owners]

    def may_disappear(self, name: str) -> bool:
        return name in self.owners or super().may_disappear(name)

    def begin(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            helper = self.side.helpers.get(new.req_id)
            if helper is not None:
                self._admit_helper(helper.request, self.accounts[helper.owner])
        super().begin(output)

    def deliver(self, output: Any) -> None:
        assert output.request_id not in self.owners, "a client hears of a helper"
        super().deliver(output)

    def new_weights(self) -> None:
        super().new_weights()
        self._adopted.clear()

    def may_be_inexact(self, account: Account, first: int) -> bool:
        name = account.request.request_id
        tracked = self.side.requests.active.get(name)
        audit = None if tracked is None else tracked.audit
        if audit is not None and audit.chosen and first < account.request.num_prompt_tokens:
            return False
        return name in self._behind or super().may_be_inexact(account, first)

    def may_read(self, account: Account, group: int, slot: int, page: int) -> bool:
        name = account.request.request_id
        owner = self.owners.get(name, name)
        if page == NULL_PAGE:  # until it starts, others may take what it would read
            intake = self.side.reuse.intakes.get(owner)
            return (intake is not None and slot in intake.in_place) or self.reads_in_place(account, slot) is not None
        if any(super(ReuseOracle, self).may_read(self.accounts[one], group, slot, page) for one in {name, owner}):
            return True
        self._check_text(account, slot, page)
        writer = self.pages.writers[page]
        ours = owner in (writer, self.owners.get(writer or ""))
        return ours or self._adopted.get(owner, {}).get(slot) == (page, self.pages.generation[page])

    def reads_in_place(self, account: Account, slot: int) -> Block | None:
        fills = ours(get_kv_transfer_group()).worker.in_place._of.get(account.request.request_id)
        if fills is None or slot not in fills.slots:
            return None
        (tokens,) = self.pages.moved(fills.where(fills.slots == slot))
        self._check_tokens(account, slot, tokens)
        assert all(self.pool.blocks[page].ref_cnt for page, _, _ in tokens), "what is read in place is not kept"
        assert not {page for page, _, _ in tokens} & self.side.reuse.fills.unconfirmed.keys(), "it is not written yet"
        return tuple(number for _, number, _ in tokens)

    def check(self) -> None:
        super().check()
        self._check_content()
        for name in self.scheduler.requests:
            helper = self.side.helpers.get(name)
            assert helper is None or helper.owner in self.scheduler.requests, "a helper outlives its request"
            assert helper is not None or name not in self.owners, "a helper is forgotten and runs"

    def check_drained(self) -> None:
        super().check_drained()
        assert not self.side.reuse.intakes
        assert all(helper.ended for helper in self.side.helpers.values())

    def check_statistics(self, stats: Any) -> None:
        """What vLLM says of its requests says nothing of helpers."""
        clients = len(self.scheduler.requests.keys() - self.owners.keys() - self.side.helpers.keys())
        counts = stats.num_running_reqs, stats.num_waiting_reqs, stats.num_skipped_waiting_reqs
        assert sum(counts) == clients and min(counts) >= 0, f"{counts} of {clients} requests"
        cache = stats.prefix_cache_stats
        assert cache.requests >= 0 and 0 <= cache.hits <= cache.queries, cache

    def _note(self, own: int, others: set[int], errors: tuple[float, ...]) -> None:
        texts = {tuple(token for _, token in self.pages.text[page]) for page in (own, *others)}
        # Of text at another position that two pages hold the comparer says whose it is.
        assert len(texts) == 1 or len(others) > 1 or self.settings.finds_other_text, "other text is compared"
        ratio = np.float32(self.policy.rule(0).ratio([np.float32(error) for error in errors]))
        for page in others:
            self._measured[page, self.pages.generation[page]].add(ratio)

    def _before_testifying(self, add: Any, pages: Any, ratios: Any, seen: Any) -> None:
        """What a page is said to be far from was compared with what it holds now."""
        for page, ratio in zip(pages.tolist(), ratios, strict=True):
            assert ratio in self._measured[page, self.pages.generation[page]], f"page {page} was never so far"
            self.totals["witnesses"] += 1
        add(pages, ratios, seen)

    def _admit_helper(self, request: Any, owner: Account) -> None:
        assert owner.ended is None, "a helper starts for a request that has ended"
        assert list(request.all_token_ids) == list(owner.request.all_token_ids[: request.num_tokens])
        twin = copy(request)
        account = Account(request, twin, [[]], [[]], [copy(owner.ever[GROUP])])
        self.owners[request.request_id] = owner.request.request_id
        self._promise(owner)
        twin.block_hashes = owner.twin.block_hashes[: request.num_tokens // self.size]
        account.ever[GROUP].clear()
        self.accounts[request.request_id] = account
        self._promise(account)
        self.totals["helpers"] += 1

    def _before_adopting(self, account: Account, first: int, pages: list[int]) -> None:
        request = account.request
        assert not request.sampling_params.extra_args, "a request that opted out reuses"  # type: ignore[union-attr]
        assert request.cache_salt is not None or self.settings.isolation == "salt", "a request without a salt reuses"
        adopted = self._adopted.setdefault(request.request_id, {})
        fills = self.side.reuse.fills
        unwritten = {page for fill in fills._planned for page in fill.pages.tolist()}
        for slot, page in enumerate(pages, first):
            if page == NULL_PAGE:
                intake = self.side.reuse.intakes[request.request_id]
                (tokens,) = self.pages.moved(intake.text.fills(np.array([intake.in_place[slot]])))
                self._check_tokens(account, slot, tokens)
            elif page not in unwritten:
                self._check_text(account, slot, page)
            adopted[slot] = page, self.pages.generation[page] + (page in unwritten)
            self.totals["filled"] += page in fills._content_of
        self.totals["adopted"] += len(pages)

    def _check_text(self, account: Account, slot: int, page: int) -> None:
        """Whatever it was computed behind, `page` holds the text of `slot`, and was written."""
        places = range(slot * self.size, (slot + 1) * self.size)
        text = [(place, account.request.all_token_ids[place]) for place in places]
        assert self.pages.text[page] == text, f"{account.request.request_id} is led to other text at {slot}"
        assert self.pages.salts[page] == account.request.cache_salt, "salts share a page"
        assert self.pages.versions[page] == self.model.version, "a page of old weights is reused"

    def _check_tokens(self, account: Account, slot: int, tokens: Any) -> None:
        """The same of `tokens` of several pages, which are read as if they stood at `slot`."""
        text = [
            (place, account.request.all_token_ids[place]) for place in range(slot * self.size, (slot + 1) * self.size)
        ]
        assert [at for _, _, at in tokens] == text, f"{account.request.request_id} reads other text in place at {slot}"
        for page, _, _ in tokens:
            assert self.pages.salts[page] == account.request.cache_salt, "salts share a page"
            assert self.pages.versions[page] == self.model.version, "a page of old weights is reused"

    def _check_content(self) -> None:
        """What is found at other positions holds what the index says, for whom it says."""
        content = self.side.candidates.residents._content
        for page, owner in {} if content is None else content._owner_of.items():
            assert content._tokens[page].tolist() == [token for _, token in self.pages.text[page]], (
                "a page has other text"
            )
            assert owner[0] == self.pages.salts[page], "a page is found under another salt"

    def _start(self, account: Account, hits: int, numbers: list[list[int]]) -> None:
        super()._start(account, hits, numbers)
        name = account.request.request_id
        if any(account.request.block_hashes[slot] != account.twin.block_hashes[slot] for slot in range(hits)):
            self._behind.add(name)
        adopted = self._adopted.get(name, {})
        table = self.groups[GROUP].req_to_blocks[name]
        for slot, (page, generation) in list(adopted.items()):
            if slot < hits and (table[slot].block_id, self.pages.generation[page]) == (page, generation):
                assert page not in self.side.reuse.fills.unconfirmed, (
                    "a page is read of which nobody says it is written"
                )
                if page == NULL_PAGE:
                    block = self.reads_in_place(account, slot)
                    assert block is not None
                    account.ever[GROUP][slot].add(block)
                    self.totals["in place"] += 1
                else:
                    self._check_text(account, slot, page)
                    account.ever[GROUP][slot].add(self.pages.block(page))
                account.merged[GROUP, slot], account.generations[GROUP, slot] = page, generation
                self.totals["reused"] += 1
            else:
                del adopted[slot]
        for slot in range(hits):
            account.ever[GROUP][slot].add(tuple(account.own[GROUP][slot]))
