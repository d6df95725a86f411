"""Threads that do one thing after another, and let nobody wait for what hangs."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from jointkv.system.background import Background, within

ROOT = Path(__file__).parents[2]


def test_what_is_submitted_is_done_in_order_and_errors_are_told() -> None:
    done: list[int] = []
    thread = Background("test", lambda: done.append(0))
    jobs = [thread.submit(done.append, number) for number in (1, 2)]
    assert [job.result(60) for job in jobs] == [None, None] and done == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 // 0).result(60)
    assert thread.submit(int, "7").result(60) == 7
    thread.stop()


def test_where_it_cannot_begin_everything_fails() -> None:
    thread = Background("test", lambda: print(1 // 0))
    with pytest.raises(ZeroDivisionError):
        thread.submit(int).result(60)
    thread.stop()


def test_after_a_stop_nothing_more_is_begun() -> None:
    thread, begun, goes_on = Background("test"), threading.Event(), threading.Event()
    job, behind = thread.submit(lambda: begun.set() or goes_on.wait(60)), thread.submit(int)
    assert begun.wait(60)
    thread.stop()
    goes_on.set()
    assert job.result(60) is True
    with pytest.raises(CancelledError):
        behind.result(60)


def test_what_takes_too_long_is_not_waited_for() -> None:
    goes_on = threading.Event()
    assert not within(0.01, lambda: bool(goes_on.wait(60)) and None)
    goes_on.set()
    assert within(60, lambda: None)
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: print(1 // 0))


def test_a_process_ends_beside_a_thread_that_hangs() -> None:
    program = "import threading; from jointkv.system.background import Background as B; B('x').submit({}.wait)"
    done = subprocess.run(
        [sys.executable, "-c", program.format("threading.Event()")], check=False, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0
