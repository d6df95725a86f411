"""vLLM's scheduler and its KV-cache manager under random events, with jointkv and a worker that has no model."""

from __future__ import annotations

import gc
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import core as engine_core
from vllm.v1.request import Request
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor

from jointkv.vllm_plugin.engine import check
from jointkv.vllm_plugin.scheduler import side as scheduler_side
from jointkv.vllm_plugin.worker import side
from tests.effort import COMBINATION_STEPS, FIRST_SEED, machine_settings
from tests.hazards import WHERE, runs
from tests.vllm_plugin.engines import BOLD, write_model
from tests.vllm_plugin.scheduler.fake_pages import (
    Comparer,
    Filler,
    Signer,
    packed_pages,
    share_reading,
    write_direction,
)
from tests.vllm_plugin.scheduler.fake_second_runner import write, write_all
from tests.vllm_plugin.scheduler.machine import TEXTS, SchedulerMachine
from tests.vllm_plugin.scheduler.variants import BLOCK, SHARES, VARIANTS, combination, configuration

EVENTS = 120
"""In the life of one engine core; some steps each."""

SIZES = (3, 4, 4, 8)
"""Of a pool, in quarters of what the variant says: a full one hides what a roomy one shows, and the other way round."""

PROBED = {"reuse": "probed", "reuse_audit_rate": 1e-9}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; only its config is read."""
    return write_model(tmp_path_factory.mktemp("unread"), 1.0, layers=1, heads=1, kv_heads=1)


@pytest.fixture(scope="module", autouse=True)
def _no_model() -> Iterator[None]:
    """What needs tensors or process groups is replaced. Numbers have no echoes, and are near more often than blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_side, "ReuseRule", BOLD)
        patch.setattr(side, "packed_pages", packed_pages)
        patch.setattr(side, "PageComparer", Comparer)
        patch.setattr(side, "PageSigner", Signer)
        patch.setattr(side, "PageFiller", Filler)
        patch.setattr(side, "share_reading", share_reading)
        patch.setattr(side, "write_direction", write_direction)
        patch.setattr(side, "number_order", lambda *_: (None, None))
        patch.setattr(side, "rotary_of", lambda *_: None)
        patch.setattr(gpu_model_runner, "get_pp_group", lambda: SimpleNamespace(is_last_rank=True))
        patch.setattr(StagedWriteTensor, "apply_write", write)
        patch.setattr(FusedStagedWriter, "apply", write_all)
        patch.setattr(engine_core, "freeze_gc_heap", lambda: None)
        patch.setattr(check, "refused", lambda found: "")
        patch.setattr(check, "check_interfaces", lambda parts: None)  # has tests of its own, and takes long
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()


@pytest.fixture
def config(variant: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of the engine of a variant."""
    fusion, options = VARIANTS[variant]
    found = configuration(model, fusion, options)
    monkeypatch.setattr(Comparer, "is_apart", options.get("apart", False))
    # vLLM would ask for Triton.
    monkeypatch.setattr(type(found), "use_v2_model_runner", options.get("second_runner", False))
    return found


def play(config: Any, totals: Counter[str], rng: random.Random) -> None:
    """The life of one engine core, as `rng` draws it; totals are added up. A failure says how it came about."""
    pages = config.cache_config.num_gpu_blocks_override
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config.cache_config, "num_gpu_blocks_override", pages * rng.choice(SIZES) // 4)
        machine = SchedulerMachine(config, totals)
    try:
        for _ in range(EVENTS):
            machine.event(rng)
        machine.finish()
    except BaseException as error:
        error.add_note(f"after {', '.join(machine.history)}")
        raise
    finally:
        machine.close()


HAZARD = pytest.mark.hazard(
    "State",
    "block tables, page pool, prefix cache and index of the engine fall out of step in some order of events",
    "pages and references always add up, no hash is answered wrongly, no salts meet, no request is lost",
)


WHATS = {
    "layer_groups": "layer groups",
    "scope": "chunks of one request",
    "candidates": "blocks of other text",
    "directions": "written directions",
    "own_norms": "own norms",
    "attention": "text read in place",
}
"""What some options show, beside fusion or reuse."""


def marked(variant: str) -> Any:
    """With what it shows of what runs where."""
    fusion, options = VARIANTS[variant]
    second, ahead, reuses = combination(variant)
    found = ["reuse" if reuses else "fusion", *(what for option, what in WHATS.items() if option in fusion)]
    found += ["pipeline stages"] * ("pipeline_parallel_size" in options)
    found += ["beside other connectors"] * ("beside" in options)
    return pytest.param(variant, marks=[mark for what in found for mark in runs(what, WHERE[2 * second + ahead])])


@HAZARD
@pytest.mark.parametrize("variant", [marked(variant) for variant in VARIANTS])
def test_random_events(variant: str, config: Any, record_property: Any) -> None:
    totals = Counter[str]()
    expected = {"approximate merges", "hits", "resumed", "finished", "aborted"}
    fusion, options = VARIANTS[variant]
    expected |= {"helpers", "adopted", "reused"} if "reuse" in fusion else set()
    expected |= {"merges of other text"} if "candidates" in fusion else set()
    expected |= {"directions"} if "directions" in fusion else set()
    expected |= {"loaded"} if "beside" in options else set()
    if "moved" in fusion:
        expected |= {"in place" if fusion.get("attention") == "shared" else "filled"}
    seeds = itertools.count(FIRST_SEED)
    enough = COMBINATION_STEPS / SHARES[combination(variant)]
    while totals["steps"] < enough or not all(totals[name] for name in expected):
        seed = next(seeds)
        try:
            play(config, totals, random.Random(seed))
        except BaseException as error:
            error.add_note(f"JOINTKV_TEST_SEED={seed} begins with this one")
            raise
    for name, count in totals.items():
        record_property(name, count)
    record_property("violations", 0)


@HAZARD
@pytest.mark.nightly
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_events_made_few(config: Any, record_property: Any) -> None:
    """Slower by far; but of a failure the shortest history is looked for."""
    totals = Counter[str]()
    # Explaining a failure runs the engine under a tracer, which takes minutes; an example kept from an earlier failure
    # need not be one any more, and would be tried for ever.
    effort = settings(machine_settings(1000), derandomize=False, database=None, phases=set(Phase) - {Phase.explain})

    @effort
    @given(rng=st.randoms())
    def drawn(rng: random.Random) -> None:
        play(config, totals, rng)

    drawn()
    for name, count in totals.items():
        record_property(name, count)
    record_property("violations", 0)


FIRST, SECOND = list(range(100, 116)), list(range(200, 216))


def donate(machine: SchedulerMachine) -> None:
    """Two requests come and go, of which one has computed `FIRST`, the other, further on, `SECOND`."""
    for donor in ([700] * BLOCK + FIRST + [500], [701] * (6 * BLOCK) + SECOND + [500]):
        machine.submit(donor, out=1)
        while machine.requests:
            machine.advance()


def test_a_helper_that_is_preempted_before_the_answer_to_its_entry_block_is_not_asked_about_twice(model: Path) -> None:
    """The second answer would be taken for that to the entry block of the next run."""
    config = configuration(model, PROBED, {"async_scheduling": True})
    machine = SchedulerMachine(config, Counter())
    side, scheduler = machine.oracle.side, machine.core.scheduler
    try:
        donate(machine)
        machine.submit([702] * BLOCK + FIRST + [703] * BLOCK + SECOND + [500], out=1)
        (request,) = machine.requests
        machine.advance()
        assert side.reuse.intakes[request.request_id].asked
        (helper,) = scheduler.running
        assert helper.request_id in side.helpers
        machine.preempt(helper)
        machine.finish()
    finally:
        machine.close()
    assert machine.totals["helpers"] > 1 and machine.totals["reused"]
    assert not side.statistics.totals()["faults"]


def test_an_entry_block_that_was_computed_behind_reused_pages_is_no_witness(model: Path) -> None:
    """It is the nearer to its sources, the more of them it has read; only what is computed exactly tells of others."""
    machine = SchedulerMachine(configuration(model, PROBED, {"pages": 60}), Counter())
    residents = machine.oracle.side.candidates.residents
    try:
        donate(machine)
        machine.submit([712] * BLOCK + FIRST + [703] * BLOCK + SECOND + [500], out=1)
        machine.finish()
    finally:
        machine.close()
    assert machine.totals["reused"] == 6, "one of the runs was not reused"
    witnessed = [residents._tokens[page].tolist() for page in residents.evidence.count.nonzero()[0]]
    assert witnessed == [FIRST[:BLOCK]]


@pytest.mark.parametrize("lost", [False, True], ids=["stays", "is lost"])
def test_who_waits_for_pages_reads_nothing_by_a_licence_that_is_lost_meanwhile(model: Path, lost: bool) -> None:
    machine = SchedulerMachine(configuration(model, {**PROBED, "reuse": "licensed"}, {"pages": 24}), Counter())
    side, licence = machine.oracle.side, [True]
    side.licences.granted = lambda page_class: licence[0]
    try:
        machine.submit([700] * BLOCK + TEXTS[0] + [500], out=1)
        while machine.requests:
            machine.advance()
        machine.submit(list(range(300, 357)), out=4)  # one that takes no more pages while others wait
        while not machine.oracle.clients[-1].delivered:
            machine.advance()
        side.candidates.residents.evidence.count[:] = 1  # or entry blocks are computed, and licences asked for again
        machine.submit([701] * BLOCK + TEXTS[0] + [500], out=1)
        machine.advance()
        assert side.reuse.intakes and not machine.totals["reused"]
        licence[0] = not lost
        machine.finish()
    finally:
        machine.close()
    # The first block of each is computed, by a helper that takes none of the pages that its request is to read.
    assert machine.totals["reused"] == (0 if lost else 8) and machine.totals["helpers"] == (0 if lost else 1)


@pytest.fixture
def priorities(model: Path) -> Iterator[SchedulerMachine]:
    config = configuration(model, PROBED, {"scheduling_policy": "priority"})
    machine = SchedulerMachine(config, Counter())
    try:
        yield machine
        machine.finish()
    finally:
        machine.close()
    assert not machine.oracle.side.statistics.totals()["faults"]


def test_a_request_that_was_scheduled_may_be_preempted_for_a_more_important_one_in_the_same_step(
    priorities: SchedulerMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempt, scheduler, before = Scheduler._preempt_request, priorities.core.scheduler, []

    def watched(self: Scheduler, request: Request, *args: Any, **options: Any) -> None:
        before.append((request.request_id, len(self.running)))
        preempt(self, request, *args, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", watched)
    priorities.submit([700] * BLOCK + TEXTS[0], out=20, priority=2)
    priorities.advance()
    priorities.submit([701] * BLOCK + TEXTS[1] + [500] * BLOCK, out=16, priority=0)
    while not before:
        priorities.advance()
        assert priorities.requests, "the pool was never full"
    # It stands first in line, so it was scheduled when the other one asked for a page.
    assert before[0] == ("request-0", 1) and scheduler.running[0].request_id == "request-1"


def test_requests_of_one_priority_may_arrive_at_the_same_moment(priorities: SchedulerMachine) -> None:
    """Several answers to one prompt do; so do their helpers."""
    priorities.submit([700] * BLOCK + TEXTS[0], out=1, arrival=0.0)
    while priorities.requests:
        priorities.advance()
    for number in range(4):
        priorities.submit([701 + number // 2] * BLOCK + TEXTS[0], out=2, arrival=1.0)
    priorities.finish()
    assert priorities.totals["finished"] == 5 and priorities.totals["helpers"] >= 2, priorities.totals
