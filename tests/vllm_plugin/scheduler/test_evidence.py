"""What is known of resident pages, and of text that was found there, is known of what they hold now."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("vllm")

from jointkv.core.reuse import Run
from jointkv.fusion.token_index import places
from jointkv.policy.reuse import ReuseRule
from jointkv.theory.licence import FirstLicences
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.audits import Audits
from jointkv.vllm_plugin.scheduler.candidates import Member
from jointkv.vllm_plugin.scheduler.evidence import Audit
from jointkv.vllm_plugin.scheduler.licences import Licences, PageClass
from jointkv.vllm_plugin.scheduler.requests import Requests, TrackedRequest
from jointkv.vllm_plugin.scheduler.resident_text import ResidentText
from jointkv.vllm_plugin.scheduler.residents import Residents
from jointkv.vllm_plugin.scheduler.side import SchedulerSide
from jointkv.vllm_plugin.settings import PluginSettings
from tests.vllm_plugin.scheduling import BLOCK, new_manager, new_request, start, step_of

HEAD, OTHER = [7] * BLOCK, [8] * BLOCK
TEXT = list(range(100, 100 + 4 * BLOCK))
PAGES = [11, 12, 13, 14]
"""Of the four blocks of `TEXT` behind a head of one block, and so of slots 1 to 4."""


class World:
    """A donor whose blocks of `TEXT` are resident, without an engine."""

    def __init__(self) -> None:
        self.requests = Requests(BLOCK)
        self.residents = Residents(32, BLOCK, moved=True)
        self.donor = self.admit(HEAD)
        self.offer(PAGES)

    def admit(self, head: Sequence[int]) -> TrackedRequest:
        name = f"request-{len(self.requests.active)}"
        tracked = self.requests.admit(new_request({}, name, prompt_token_ids=[*head, *TEXT, 5]))
        assert tracked is not None
        return tracked

    def offer(self, pages: Sequence[int]) -> None:
        for slot, page in enumerate(PAGES, 1):
            if page in pages:
                (place,) = places(self.donor.hashes(slot + 1)[slot : slot + 1], np.array([slot]))
                self.residents.add(self.donor, slot, page, (((self.donor.isolation, 0), place),))

    def compute_again(self, page: int) -> None:
        """The donor was preempted; it gets `page` for the same block, computed behind a page that it reuses."""
        self.residents.remove(page)
        self.donor.private_from = BLOCK
        self.offer([page])

    def find(self, tracked: TrackedRequest) -> ResidentText:
        return ResidentText(self.residents, tracked, 0, (tracked.request.num_tokens - 1) // BLOCK, 0, 1)


@pytest.fixture
def world() -> World:
    return World()


def test_what_a_request_has_computed_again_is_not_what_was_found(world: World) -> None:
    text = world.find(world.admit(OTHER))
    run = Run(1, world.donor.number, np.array(PAGES))
    assert text.is_whole and text.found.page.tolist() == PAGES and text.holds(run).all()
    world.compute_again(PAGES[1])
    assert not text.is_whole and text.holds(run).tolist() == [True, False, True, True]


def test_nothing_is_written_or_read_in_place_from_what_was_computed_again(world: World) -> None:
    """Of text at other positions only what was computed exactly is read."""
    text = world.find(world.admit(OTHER[:20]))
    numbers = text.found.page
    assert len(numbers) == 3 and text.can_be_written(numbers).all()
    world.compute_again(PAGES[0])
    # A block of another alignment comes from two pages.
    assert not text.is_whole and text.can_be_written(numbers).tolist() == [False, True, True]


@pytest.mark.parametrize("again", [False, True], ids=["stays", "computed again"])
def test_an_audit_is_a_witness_of_what_it_has_compared(world: World, again: bool) -> None:
    licences = Licences(FirstLicences({}, 0.3, 0.95), Statistics())
    audits, audited = Audits(ReuseRule(), world.residents, licences), world.admit(OTHER)
    audited.audit = Audit()
    for slot, page in enumerate(PAGES, 1):
        audits.note(audited, audited.audit, slot, page, 0.5)
    if again:
        world.compute_again(PAGES[1])
    audited.next_slot = 5
    audits.conclude_if_complete(audited)
    assert world.residents.evidence.count[PAGES].tolist() == [1, int(not again), 1, 1]


def test_a_page_that_is_compared_again_counts_as_what_it_is_by_then(world: World) -> None:
    statistics = Statistics()
    licences = Licences(FirstLicences({}, 0.3, 0.95), statistics, needed=False)
    audits, audited = Audits(ReuseRule(least=1), world.residents, licences), world.admit(OTHER)
    audited.audit, audited.next_slot = Audit(chosen=True), 5
    audits.note(audited, audited.audit, 2, PAGES[1], 0.1)
    for page in PAGES:
        world.compute_again(page)
    for slot, page in enumerate(PAGES, 1):
        audits.note(audited, audited.audit, slot, page, 0.1)
    audits.conclude_if_complete(audited)
    assert statistics.totals()["reuse_audits"] == 1


@pytest.mark.parametrize(
    ("granted", "chosen", "by_entries", "heard"),
    [(False, False, True, 1), (True, False, True, 0), (True, True, True, 1), (True, True, False, 0)],
    ids=["no licence", "passed over", "drawn", "entry blocks do not pay"],
)
def test_under_a_licence_only_audits_of_what_would_have_been_read_count(
    world: World, granted: bool, chosen: bool, by_entries: bool, heard: int
) -> None:
    """Of requests that reuse has passed over all are compared, fifty for one that is drawn."""
    statistics = Statistics()
    licences = Licences(FirstLicences({}, 0.3, 0.95), statistics)
    audits, audited = Audits(ReuseRule(), world.residents, licences), world.admit(OTHER)
    if granted:
        while not licences.granted(PageClass(audited.isolation, exact=True)):
            licences.observe(PageClass(audited.isolation, exact=True), 0, 3)
    before = statistics.totals()["reuse_audits"]
    audited.audit, audited.next_slot = Audit(chosen=chosen, by_entries=by_entries), 5
    for slot, page in enumerate(PAGES, 1):
        audits.note(audited, audited.audit, slot, page, 0.5)
    audits.conclude_if_complete(audited)
    assert statistics.totals()["reuse_audits"] - before == heard
    assert world.residents.evidence.count[PAGES].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("head, witnesses", [(OTHER, 1), (HEAD, 0)], ids=["another text", "the same"])
def test_a_block_behind_the_same_text_is_no_witness(world: World, head: list[int], witnesses: int) -> None:
    """It is as near as can be, and says nothing of other text."""
    text, slots = world.find(world.admit(head)), np.arange(1, 5)
    text.testify(slots, np.array(PAGES), np.zeros(4, np.float32))
    assert world.residents.evidence.count[PAGES].tolist() == [witnesses] * 4


@pytest.mark.parametrize("chosen, looked_at", [(False, 2), (True, 4)], ids=["others", "drawn"])
def test_an_audit_that_was_drawn_is_of_the_whole_prompt_however_long(chosen: bool, looked_at: int) -> None:
    """The request may end with this step, and its audit with it."""
    manager, request = new_manager(), new_request({})
    side = SchedulerSide(PluginSettings(min_pool_usage=0.0, max_blocks_per_step=2, reuse="licensed"), manager, (0,))
    tracked = side.requests.admit(request)
    assert tracked is not None
    tracked.audit = Audit(chosen=chosen)
    assert len(list(side.candidates.new_members(step_of([start(manager, request)])))) == looked_at
    assert tracked.next_slot == looked_at


def test_a_block_is_not_compared_with_the_page_that_holds_it() -> None:
    """Another request that hit it as an exact prefix has offered it to all while the block was compared with others."""
    side = SchedulerSide(PluginSettings(min_pool_usage=0.0), new_manager(), (0,))
    tracked = side.requests.admit(new_request({}))
    assert tracked is not None
    buckets = (((tracked.isolation, 0), 1),)
    for page in (5, 7):
        side.candidates.residents.add(tracked, 1, page, buckets)
    member = Member(tracked, 0, 0, 1, 5, 0, buckets, (), [6])
    assert side.candidates.try_others(member) and member.candidates == [7]
    assert not side.candidates.try_others(member)
