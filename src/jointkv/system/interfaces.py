"""Whether another package still has what jointkv uses of it: a look of milliseconds that names every difference."""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

ANY = "_"
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Use:
    """What is used of a class or module of another package.

    Attributes:
        owner: `module:Class`, or `module`.
        members: names of attributes, fields and properties; or calls such as `pop(_,_,strict)`, with `_` for an
            argument given by its place and a name for one given by its name. Apart by spaces, of which calls have none.
        overridden: methods and properties that a subclass in jointkv replaces, and that the package calls, likewise.
        by: that subclass.
    """

    owner: str
    members: str = ""
    overridden: str = ""
    by: type | None = None

    @property
    def name(self) -> str:
        """For messages: the class, or the module."""
        return self.owner.rpartition(":")[2]


def differences(uses: Iterable[Use]) -> list[str]:
    """What of `uses` is missing or takes other arguments, a few words each; empty if all is as it is used."""
    return [difference for use in uses for difference in _of_use(use)]


def _of_use(use: Use) -> Iterator[str]:
    module, _, class_name = use.owner.partition(":")
    try:
        owner = importlib.import_module(module)
    except ImportError as error:
        yield f"{module} cannot be imported ({error})"
        return
    if class_name and not hasattr(owner, class_name):
        yield f"{module} has no {class_name}"
        return
    owner = getattr(owner, class_name) if class_name else owner
    members = use.members.split()
    missing = [name for member in members if not hasattr(owner, name := member.partition("(")[0])]
    missing = sorted(set(missing) - _of_objects(owner, missing)) if missing else []
    for member in members:
        name, called, arguments = member.rstrip(")").partition("(")
        if name in missing:
            yield f"{use.name} has no {name}"
        elif called and (problem := _refusal(owner, name, arguments)):
            yield f"{use.name}.{name} is not called as {member}: {problem}"
    if use.by is not None:
        yield from _of_overrides(use, owner, use.by)


def _of_objects(owner: Any, names: Sequence[str]) -> set[str]:
    """What of `names` objects of a class have that the class has not: fields, and what its methods set."""
    found: set[str] = set()
    for each in owner.__mro__ if isinstance(owner, type) else ():
        found.update(vars(each).get("__annotations__", ()))
        for method in vars(each).values():
            code = getattr(inspect.unwrap(method), "__code__", None) if isinstance(method, FunctionType) else None
            if code is not None and not found.issuperset(set(names).intersection(code.co_names)):
                found.update(step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR")
    return found.intersection(names)


def _refusal(owner: Any, name: str, arguments: str) -> str | None:
    """Why `name` does not take `arguments`; None if it does, or has no signature to ask."""
    words = [word.strip() for word in arguments.split(",") if word.strip()]
    placed = [None] * words.count(ANY)
    if isinstance(owner, type) and isinstance(inspect.getattr_static(owner, name), FunctionType):
        placed.append(None)  # self
    try:
        inspect.signature(getattr(owner, name)).bind(*placed, **{word: None for word in words if word != ANY})
    except TypeError as error:
        return str(error)
    except ValueError:
        return None
    return None


def _of_overrides(use: Use, theirs: Any, ours: type) -> Iterator[str]:
    for name in use.overridden.split():
        if not hasattr(theirs, name):
            yield f"{use.name} has no {name}, so nothing would call jointkv's"
        elif problem := _unlike(getattr(theirs, name), getattr(ours, name)):
            yield f"{use.name}.{name} {problem}"
    for name in sorted(name for name in getattr(ours, "__abstractmethods__", ()) if hasattr(theirs, name)):
        yield f"{use.name} asks for {name}, which jointkv does not have"


def _unlike(theirs: Any, ours: Any) -> str | None:
    """Which parameter of `theirs` callers might give and `ours` does not take, or lacks a value for."""
    if not callable(theirs) or not callable(ours):
        return None
    wanted, taken = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
    takes_more = {parameter.kind for parameter in taken.values()}
    for name, parameter in wanted.items():
        if parameter.kind in VARIABLE:
            continue
        spare = parameter.VAR_KEYWORD if parameter.kind == parameter.KEYWORD_ONLY else parameter.VAR_POSITIONAL
        if name not in taken and spare not in takes_more:
            return f"passes {name}, which jointkv's does not take"
    for name, parameter in taken.items():
        if parameter.kind not in VARIABLE and parameter.default is parameter.empty and name not in wanted:
            return f"does not pass {name}, which jointkv's needs"
    return None
