"""Threads that use caches of one pool: what concerns all of them is done by one at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from jointkv.core.bookkeeping import bookkeeping

P = ParamSpec("P")
R = TypeVar("R")


class Locked(Protocol):
    """What has a lock for all that belongs to a pool."""

    @property
    def lock(self) -> threading.RLock: ...


Self = TypeVar("Self", bound=Locked)


def alone(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """`bookkeeping`, while no other thread does any of the same pool."""
    kept = bookkeeping(method)

    @functools.wraps(method)
    def wrapper(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return kept(self, *args, **kwargs)

    return wrapper
