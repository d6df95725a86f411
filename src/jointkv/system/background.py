"""Threads for what a disk may keep waiting.

Those of a thread pool are waited for when the interpreter ends; a disk that hangs would keep it for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

R = TypeVar("R")


class Background:
    """A thread that does one thing after another.

    Args:
        name: of the thread.
        begin: what it does first; nothing is done where that fails, and it is what everything fails by.
    """

    def __init__(self, name: str, begin: Callable[[], None] = lambda: None) -> None:
        self._begin, self._stopped = begin, False
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[..., R], *args: Any) -> Future[R]:
        """Do `work` with `args` after all that was submitted before; after `stop` it is cancelled."""
        future: Future[R] = Future()
        self._jobs.put((future, work, args))
        return future

    def stop(self, seconds: float = 0.0) -> None:
        """Begin nothing more; what is being done goes on, and is waited for so long."""
        self._stopped = True
        self._jobs.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        broken: Exception | None = None
        try:
            self._begin()
        except Exception as error:
            broken = error
        while (job := self._jobs.get()) is not None:
            future, work, args = job
            if self._stopped:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if broken is not None:
                    raise broken
                future.set_result(work(*args))
            except Exception as error:
                future.set_exception(error)


def within(seconds: float, work: Callable[[], None]) -> bool:
    """Do `work`, and wait so long for it; whether it has ended by then. Raises what it raises."""
    thread = Background("jointkv-once")
    done = thread.submit(work)
    wait([done], seconds)
    thread.stop()
    if done.done():
        done.result()
    return done.done()
