"""Finding a traffic, a method, a task or a data set by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol, TypeVar

from jointkv.errors import BadInput
from jointkv.system.nearest import not_known


class Named(Protocol):
    """What has a name."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def find(kind: str, known: Iterable[T], name: str, also: str = "") -> T:
    """The one of `known` called `name`; case, blanks, `-` and `_` do not matter.

    Raises `BadInput`, which lists the names, and `also`, for an unknown name.
    """
    found = {_plain(each.name): each for each in known}
    if _plain(name) not in found:
        raise BadInput(f"unknown {kind} {not_known(name, (each.name for each in found.values()), also)}")
    return found[_plain(name)]


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]+", " ", name).strip().lower()
