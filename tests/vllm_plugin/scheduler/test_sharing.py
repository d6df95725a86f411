"""A slot reads another's page: only one that is still what was compared, for others under no hash of its text."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request, RequestStatus

from jointkv.vllm_plugin.engine.runners.base import Remap
from jointkv.vllm_plugin.messages import Inquiry
from jointkv.vllm_plugin.scheduler.side import SchedulerSide
from jointkv.vllm_plugin.settings import PluginSettings
from tests.vllm_plugin.scheduling import BLOCK, TOKENS, new_manager, new_request, start, step_of, verdict_on

TEXT = TOKENS[:BLOCK]


class Pair:
    """Two requests with equal text behind prefix caching's back, the second asked about."""

    def __init__(self, manager: KVCacheManager, text: list[int] = TEXT, **settings: Any) -> None:
        self.manager = manager
        self.side = SchedulerSide(PluginSettings(min_pool_usage=0.0, check_integrity=True, **settings), manager, (0,))
        self.requests = [new_request({}, name, prompt_token_ids=text) for name in ("first", "second")]
        started = []
        for request in self.requests:
            self.side.admit(request)
            started.append(start(manager, request))
        self.pages = [self.table(request) for request in self.requests]
        self.inquiry: Inquiry = self.side.next_inquiry(step_of(started))

    def table(self, request: Request) -> list[int]:
        return list(self.manager.get_block_ids(request.request_id)[0])

    def settle(self, error: float = 0.0) -> list[Remap]:
        """What the workers are told after a verdict on the inquiry."""
        self.side.settle(verdict_on(self.inquiry, error))
        assert self.side.recovery.cause is None
        return self.side.next_inquiry(step_of()).remaps


def test_the_workers_are_told_once_and_the_page_is_free() -> None:
    pair = Pair(new_manager(prefix_caching=False))
    (kept,), (own,) = pair.pages
    free = pair.manager.block_pool.get_num_free_blocks()
    assert pair.settle() == [Remap("second", 0, 0, page=kept, own=own, step=1)]
    assert pair.table(pair.requests[1]) == [kept] and pair.manager.block_pool.get_num_free_blocks() == free + 1
    assert pair.side.next_inquiry(step_of()).remaps == []
    assert pair.side.statistics.totals()["blocks_merged"] == 1


def test_a_block_of_an_earlier_life_is_not_given_up() -> None:
    """Preempted and back on the very same page before the verdict comes: it is not written again yet."""
    pair = Pair(new_manager(pages=2, prefix_caching=False))
    second = pair.requests[1]
    pair.manager.free(second)
    second.num_preemptions += 1
    start(pair.manager, second)
    assert pair.table(second) == pair.pages[1]
    assert pair.settle() == []
    assert pair.table(second) == pair.pages[1]
    assert pair.side.statistics.totals()["rejected"] == {"request_gone": 1}


def test_a_request_that_waits_is_left_alone() -> None:
    pair = Pair(new_manager(prefix_caching=False))
    pair.requests[1].status = RequestStatus.PREEMPTED
    assert pair.settle() == [] and pair.side.statistics.totals()["rejected"] == {"request_gone": 1}


def test_another_page_in_the_slot() -> None:
    pair = Pair(new_manager(prefix_caching=False))
    pair.manager.free(pair.requests[1])
    start(pair.manager, new_request({}, "third", prompt_token_ids=TEXT))
    start(pair.manager, pair.requests[1])
    assert pair.settle() == [] and pair.side.statistics.totals()["rejected"] == {"entry_changed": 1}


def test_a_candidate_that_is_written_meanwhile() -> None:
    pair = Pair(new_manager(prefix_caching=False))
    (kept,), _ = pair.pages
    later = pair.side.next_inquiry(step_of(running=[("other", [kept], 0)]))
    assert not len(later.group)
    assert pair.settle() == [] and pair.side.statistics.totals()["rejected"] == {"representative_gone": 1}


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_what_follows_an_approximated_block_is_nobody_elses(error: float) -> None:
    """The first block differs, so exact prefix caching finds nothing; of the second the text is equal."""
    manager = new_manager()
    side = SchedulerSide(PluginSettings(min_pool_usage=0.0, check_integrity=True), manager, (0,))
    requests = [new_request({}, name, prompt_token_ids=[number] * BLOCK + TEXT) for number, name in enumerate("ab")]
    for request in requests:
        side.admit(request)
    inquiry = side.next_inquiry(step_of([start(manager, request) for request in requests]))
    assert len(inquiry.group) == 1
    exact = list(requests[1].block_hashes)
    side.settle(verdict_on(inquiry, error))
    (remap,) = side.next_inquiry(step_of()).remaps
    assert (remap.request_id, remap.slot) == ("b", 1)
    hashes = requests[1].block_hashes
    assert hashes[0] == exact[0] and (hashes[1] == exact[1]) == (error == 0)
    side.dismiss("b")
    side.check_integrity()


def test_beyond_the_bound_a_block_becomes_resident_itself() -> None:
    pair = Pair(new_manager(prefix_caching=False))
    assert pair.settle(error=0.21) == []
    assert set(pair.pages[1]) <= set(pair.side.candidates.residents.index._buckets)
    assert pair.side.statistics.totals()["rejected"] == {"bound": 1}


@pytest.mark.parametrize("loaded", [0, 3])
def test_pages_that_a_request_starts_with_are_found_by_nobody_whose_text_they_held(loaded: int) -> None:
    """Also those that another connector fills: vLLM counts them as computed."""
    manager = new_manager(pages=4, prefix_caching=False)
    side = SchedulerSide(PluginSettings(min_pool_usage=0.0), manager, (0,))
    first, second = (new_request({"salt": name}, name) for name in ("red", "blue"))
    side.admit(first)
    inquiry = side.next_inquiry(step_of([start(manager, first)]))
    side.settle(verdict_on(inquiry))
    residents, pages = side.candidates.residents, manager.get_block_ids("red")[0]
    assert len(pages) == 4 and all(page in residents for page in pages)
    side.dismiss("red")
    manager.free(first)
    side.admit(second)
    assert not side.holds(second, 0)
    given = manager.allocate_slots(second, len(TOKENS) - loaded * BLOCK, num_external_computed_tokens=loaded * BLOCK)
    assert given is not None
    side.allocate(second, manager.get_block_ids("blue"))
    assert sorted(manager.get_block_ids("blue")[0]) == sorted(pages)
    assert not any(page in residents for page in pages) and side.recovery.cause is None


def test_pages_that_a_request_finds_stay_resident() -> None:
    manager = new_manager(pages=8)
    side = SchedulerSide(PluginSettings(min_pool_usage=0.0), manager, (0,))
    first, second = (new_request({}, name) for name in ("first", "second"))
    side.admit(first)
    side.settle(verdict_on(side.next_inquiry(step_of([start(manager, first)]))))
    side.admit(second)
    blocks, found = manager.get_computed_blocks(second)[:2]
    assert found == 3 * BLOCK and not side.holds(second, found)
    assert manager.allocate_slots(second, BLOCK, num_new_computed_tokens=found, new_computed_blocks=blocks) is not None
    pages = manager.get_block_ids("second")[0]
    side.allocate(second, (pages,))
    assert [page in side.candidates.residents for page in pages] == [True, True, True, False]
