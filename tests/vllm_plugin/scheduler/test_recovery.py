"""The rule by which fusion comes back after errors, on a clock of the test's own."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("vllm")

from jointkv.errors import BadInput
from jointkv.vllm_plugin.scheduler.recovery import Recovery
from jointkv.vllm_plugin.settings import PluginSettings


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_every_wait_is_twice_the_last_until_there_is_none(clock: Clock) -> None:
    recovery = Recovery(60.0, 4, clock)
    assert not recovery.off and not recovery.resume() and recovery.cause is None
    for fault, wait in enumerate((60, 120, 240), start=1):
        assert recovery.fault(f"error {fault}")
        assert recovery.off and not recovery.for_good and recovery.outlook == f"for {wait} s"
        clock.now += wait - 0.001
        assert not recovery.resume() and recovery.off
        clock.now += 0.001
        assert recovery.resume() and not recovery.off and not recovery.resume()
        assert recovery.cause == f"error {fault}"
    assert recovery.fault("error 4") and recovery.for_good and recovery.outlook == "until the engine is restarted"
    clock.now = math.nextafter(math.inf, 0)
    assert not recovery.resume() and recovery.off and recovery.faults == 4


def test_what_goes_wrong_meanwhile_neither_counts_nor_prolongs_the_wait(clock: Clock) -> None:
    recovery = Recovery(60.0, 2, clock)
    recovery.fault("first")
    clock.now += 59
    assert not recovery.fault("echo") and recovery.faults == 1 and recovery.cause == "first"
    clock.now += 1
    assert recovery.resume()


@pytest.mark.parametrize("waiting", [False, True])
def test_a_broken_invariant_ends_it_at_once(clock: Clock, waiting: bool) -> None:
    recovery = Recovery(60.0, 9, clock)
    if waiting:
        recovery.fault("first")
    assert recovery.fault("tables differ", for_good=True)
    clock.now += 1e9
    assert recovery.for_good and not recovery.resume() and recovery.cause == "tables differ"
    assert not recovery.fault("again", for_good=True)


@pytest.mark.parametrize(("retry_after", "max_faults"), [(None, 3), (60.0, 1)])
def test_no_second_chance(clock: Clock, retry_after: float | None, max_faults: int) -> None:
    recovery = Recovery(retry_after, max_faults, clock)
    assert recovery.fault("first") and recovery.for_good
    clock.now += 1e9
    assert not recovery.resume()


def test_without_a_wait_the_next_request_is_fused_again(clock: Clock) -> None:
    recovery = Recovery(0.0, 3, clock)
    assert recovery.fault("first") and recovery.resume()


def test_the_options() -> None:
    settings = PluginSettings.parse({})
    assert (settings.retry_after, settings.max_faults) == (60.0, 3)
    assert PluginSettings.parse({"retry_after": None}).retry_after is None
    for options in ({"retry_after": -1}, {"retry_after": float("inf")}, {"max_faults": 0}, {"max_faults": 17}):
        with pytest.raises(BadInput, match=next(iter(options))):
            PluginSettings.parse(options)
