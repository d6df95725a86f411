"""The look at another package's interface: every kind of difference is seen and named, and nothing else is."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import NamedTuple

import pytest

from jointkv.system.interfaces import Use, differences


class Base:
    annotated: int

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[int] = []

    @property
    def length(self) -> int:
        return self.size

    @classmethod
    def make(cls, size: int) -> Base:
        return cls(size)

    def add(self, part: int, *, last: bool = False) -> None:
        self.parts.append(part)

    def step(self, output: int, context: int = 0) -> None: ...


@dataclass
class Record:
    number: int
    optional: int | None = None


class Pair(NamedTuple):
    left: int


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType("other_package")
    made.__dict__.update(Base=Base, Record=Record, Pair=Pair, function=lambda one, two=2: None)
    monkeypatch.setitem(sys.modules, "other_package", made)
    return made


def of(owner: str, *members: str) -> list[str]:
    return differences([Use(f"other_package{owner}", " ".join(members))])


def test_what_is_there() -> None:
    assert not of(":Base", "annotated", "size", "parts", "length", "add(_)", "add(_,last)", "make(_)", "__init__(size)")
    assert not of(":Record", "number", "optional") + of(":Pair", "left") + of("", "function(_)", "function(one,two)")
    assert not of("", "Base(_)")


@pytest.mark.parametrize(
    ("owner", "member", "said"),
    [
        (":Base", "weight", "Base has no weight"),
        (":Record", "weight", "Record has no weight"),
        (":Other", "weight", "other_package has no Other"),
        (":Base", "add()", "missing a required argument: 'part'"),
        (":Base", "add(_,_)", "too many positional arguments"),
        (":Base", "add(_,first)", "unexpected keyword argument 'first'"),
        (":Base", "make()", "missing a required argument: 'size'"),
        ("", "function(one,three)", "'three'"),
        ("", "other()", "other_package has no other"),
        (".inner", "x", "other_package.inner cannot be imported"),
    ],
)
def test_what_is_not(owner: str, member: str, said: str) -> None:
    (difference,) = of(owner, member)
    assert said in difference


class Same(Base):
    def step(self, output: int, context: int = 1) -> None: ...


class Loose(Base):
    def step(self, *arguments: int, **named: int) -> None: ...


class Short(Base):
    def step(self, output: int) -> None: ...


class Eager(Base):
    def step(self, output: int, context: int, result: int) -> None: ...


class Unasked(Base):
    def stop(self) -> None: ...


@pytest.mark.parametrize(
    ("ours", "name", "said"),
    [
        (Same, "step", None),
        (Loose, "step", None),
        (Short, "step", "Base.step passes context, which jointkv's does not take"),
        (Eager, "step", "Base.step does not pass result, which jointkv's needs"),
        (Unasked, "stop", "Base has no stop, so nothing would call jointkv's"),
    ],
)
def test_overrides(ours: type, name: str, said: str | None) -> None:
    found = differences([Use("other_package:Base", "", name, by=ours)])
    assert found == ([] if said is None else [said])


def test_every_difference_is_named() -> None:
    assert len(of(":Base", "one", "size", "two()", "add()")) == 3
