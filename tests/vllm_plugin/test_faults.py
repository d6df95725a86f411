"""An error anywhere in the plugin switches fusion off for a while, is counted and logged once, and harms no request."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest

pytest.importorskip("vllm")

from jointkv.errors import IntegrityError
from jointkv.vllm_plugin import prometheus
from jointkv.vllm_plugin.scheduler.page_readers import PageReaders
from tests.vllm_plugin.engines import near_prefix
from tests.vllm_plugin.faulty import OUT, Injected, Patient, raising

pytest_plugins = ("tests.vllm_plugin.faulty",)

SCHEDULER = (
    "requests.admit",
    "questions.ask",
    "questions.settle",
    "requests.pop",
    "tables.may_replace",
    "tables.make_private",
    "tables.replace",
    "tables.answer_for",
    "tables.forget",
    "bounds.allowed",
    "candidates.new_members",
    "candidates.residents.index.candidates",
    "candidates.residents.index.add",
    "candidates.residents.index.remove",
    "candidates.residents.index.prefer",
    "statistics.take",
    "statistics.merged",
)

ERROR = pytest.mark.hazard(
    "Faults",
    "an error in any hook of the plugin",
    "all requests are answered in full; fusion is off at once and back after the wait; counted and logged once",
)
INVARIANT = pytest.mark.hazard(
    "Faults",
    "a broken invariant, in the scheduler or in a worker",
    "fusion is off until the engine is restarted; requests go on unfused",
)


def break_(patient: Patient, hook: str, instead: Callable[..., Any] = raising) -> None:
    *owners, name = hook.split(".")
    patient.patch.setattr(reduce(getattr, owners, patient.engine.side), name, instead)


@ERROR
@pytest.mark.parametrize("hook", SCHEDULER)
def test_in_the_scheduler(patient: Patient, hook: str) -> None:
    break_(patient, hook)
    patient.serve_on()
    if hook in ("requests.pop", "tables.forget"):  # what these have not done for requests that are gone
        patient.engine.side.requests.left_alone.clear()
        patient.engine.pool.cached_block_hashes_by_block.clear()
    patient.assert_off("on purpose")
    patient.assert_comes_back()


@ERROR
@pytest.mark.parametrize("hook", ["begin", "finish"])
def test_in_the_worker(patient: Patient, hook: str) -> None:
    """A worker once dropped its comparer after an error, so that it could never answer again."""
    patient.patch.setattr(patient.worker.comparer, hook, raising)
    patient.serve_on()
    patient.assert_off("a worker gave up: Injected: on purpose")
    patient.assert_comes_back()


@ERROR
def test_after_a_commit(patient: Patient) -> None:
    """The table has changed when the error comes: the workers must follow it, as the census watches."""
    replace = patient.engine.side.tables.replace

    def late(*args: Any) -> None:
        replace(*args)
        raise Injected("on purpose")

    break_(patient, "tables.replace", late)
    patient.serve_on()
    patient.assert_off("on purpose")
    assert patient.new("blocks_merged") == 0 and patient.engine.side.sharing._remaps == []
    patient.assert_comes_back()


@ERROR
def test_while_vllm_empties_its_caches(patient: Patient) -> None:
    """`reset_cache` and `get_kv_connector_stats` once let an error through, which ends the engine."""
    start_anew = patient.engine.side._start_anew

    def once() -> None:
        patient.patch.setattr(patient.engine.side, "_start_anew", start_anew)
        raise Injected("on purpose")

    break_(patient, "_start_anew", once)
    assert patient.engine.vllm_scheduler.reset_connector_cache()
    patient.serve_on()
    patient.assert_off("on purpose")
    patient.assert_comes_back()


@ERROR
def test_in_the_report_of_shared_pages(patient: Patient) -> None:
    break_(patient, "tables.shared_pages")
    patient.engine.connector.scheduler.readers = PageReaders(patient.engine.side.tables)  # counts with the next step
    patient.serve_on()
    patient.assert_off("on purpose")
    patient.assert_comes_back()


@INVARIANT
def test_a_broken_invariant_of_the_scheduler(patient: Patient) -> None:
    def broken() -> None:
        raise IntegrityError("on purpose")

    break_(patient, "check_integrity", broken)
    patient.engine.watchers.remove(patient.census.after_step)  # it checks by the same method
    patient.serve_on()
    patient.engine.watchers.append(patient.census.after_step)
    patient.assert_off("until the engine is restarted", state="disabled")
    patient.assert_stays_off()


@INVARIANT
def test_a_broken_invariant_of_a_worker(patient: Patient) -> None:
    def broken(*args: Any) -> None:
        raise IntegrityError("worker and scheduler disagree")

    patient.patch.setattr(patient.worker, "_check_tables", broken)
    patient.serve_on()
    patient.assert_off("worker and scheduler disagree", state="disabled")
    patient.assert_stays_off()


@pytest.mark.hazard(
    "Faults",
    "errors that come back",
    "every wait is twice the last; after the third error fusion is off until the engine is restarted",
)
def test_the_third_error_is_the_last(patient: Patient) -> None:
    side = patient.engine.side
    for number, wait in enumerate((60.0, 120.0), start=1):
        break_(patient, "questions.settle")
        patient.serve_on(seed=3 + 2 * number)
        patient.patch.undo()
        assert (patient.new("faults"), patient.engine.statistics["state"]) == (number, "recovering")
        assert f"for {wait:g} s" in patient.errors[-1]
        patient.clock.now += wait - 1
        patient.serve_on(seed=10)
        assert not side.enabled
        patient.clock.now += 1
        patient.serve_on(seed=4 + 2 * number)
        assert side.enabled and patient.engine.statistics["state"] == "active"
    break_(patient, "questions.settle")
    patient.serve_on(seed=11)
    patient.patch.undo()
    assert patient.new("faults") == len(patient.errors) == 3 and "until the engine is restarted" in patient.errors[-1]
    patient.assert_stays_off()


@pytest.mark.hazard(
    "Faults",
    "requests that run while fusion goes off and on again",
    "their tables are left as they are for the rest of their life; they finish and give back all they hold",
)
def test_those_that_ran_are_left_alone(patient: Patient) -> None:
    old = list(patient.running)
    break_(patient, "questions.ask")
    patient.engine.step()
    patient.patch.undo()
    held = {name: set(patient.engine.table(name)) for name in old}
    patient.clock.now += 60
    patient.engine.watchers.append(check := lambda served: all(old_pages_kept(patient, held)))
    try:
        for prompt in near_prefix(6, shared=200)[3:]:  # the same text as theirs behind other lines
            patient.running.append(patient.engine.submit(prompt, OUT))
        patient.serve_on()
    finally:
        patient.engine.watchers.remove(check)
    assert patient.new("blocks_merged") > 0
    newcomers = [pair for pair in patient.census.met[-patient.new("blocks_merged") :]]
    assert not [pair for pair in newcomers for name in old if any(one.startswith(f"{name}-") for one in pair)]
    patient.assert_comes_back()


def old_pages_kept(patient: Patient, held: dict[str, set[int]]) -> list[bool]:
    running = {
        name for request in patient.engine.vllm_scheduler.requests for name in held if request.startswith(f"{name}-")
    }
    kept = [held[name] <= set(patient.engine.table(name)) for name in running]
    assert all(kept)
    return kept


@pytest.mark.hazard(
    "Faults", "a hook that is slow", "requests wait; nothing else changes, and the time shows in the metrics"
)
@pytest.mark.parametrize("hook", ["requests.admit", "questions.ask", "questions.settle", "finish"])
def test_a_delay(patient: Patient, hook: str) -> None:
    part, _, hook = hook.rpartition(".")
    owner = getattr(patient.engine.side, part) if part else patient.worker.comparer
    work = getattr(owner, hook)

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return work(*args)

    patient.patch.setattr(owner, hook, slow)
    patient.serve_on()
    clock = "compare_seconds" if hook == "finish" else "schedule_seconds"
    spent = patient.engine.statistics[clock] - patient.before[clock]
    assert patient.new("blocks_merged") > 0
    # A comparison times itself inside the delay.
    assert hook == "finish" or spent >= 0.02
    patient.patch.undo()
    patient.assert_unharmed()


@ERROR
def test_in_the_metrics_of_the_api_server(caplog: pytest.LogCaptureFixture) -> None:
    """An error there once ended vLLM's API server."""
    metrics = object.__new__(prometheus.JointPromMetrics)
    metrics._lost = False
    prometheus.logger.propagate = True
    try:
        for _ in range(2):
            metrics.observe({"counters": {"blocks_merged": 1}})
    finally:
        prometheus.logger.propagate = False
    assert [record.getMessage() for record in caplog.records] == ["jointkv's metrics are incomplete from now on"]
