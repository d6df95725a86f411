"""The texts that stand behind the headers: what many requests share, and lists in which a header's facts matter."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from jointkv.evaluate.samples import packaged
from jointkv.evaluate.traffic.gsm8k import load_problems
from jointkv.evaluate.traffic.museum import MUSEUMS, museum_line
from jointkv.evaluate.traffic.tool_dialogues import load_dialogues

_PEOPLE = ("Ms Hart", "Mr Lund", "Ms Adeyemi", "Mr Rossi", "Ms Chen", "Mr Novak", "Ms Silva", "Mr Weber", "Ms Dahl")
_CITIES = ("Oslo", "Lima", "Porto", "Graz", "Kyoto", "Accra", "Turin", "Cork", "Lyon", "Perth", "Quito", "Malmö")
_GOODS = ("lamp", "chair", "desk", "shelf", "sofa", "stool", "mirror", "carpet", "cabinet", "bench", "vase", "clock")
_ROLES = ("nurse", "driver", "cook", "clerk", "welder", "teacher", "painter", "guard", "baker", "tailor")


def _worked_examples(rng: random.Random) -> str:
    return "\n\n".join(problem.worked for problem in rng.sample(load_problems(), 8))


def _tools(rng: random.Random) -> str:
    lists = sorted({dialogue.instructions for dialogue in load_dialogues()})
    return "\n".join(rng.sample(lists, len(lists)))


def _novel(rng: random.Random) -> str:
    text = packaged("novel_sample.txt").read_text(encoding="utf-8")
    paragraphs = text.split("\n\n")
    start = rng.randrange(10, len(paragraphs) // 2)
    return "\n\n".join(paragraphs[start : start + 60])


def _listed(line: Callable[[str, random.Random], str], names: Sequence[str]) -> Callable[[random.Random], str]:
    """A text of one sentence for each of `names`, in random order."""
    return lambda rng: "\n".join(line(name, rng) for name in rng.sample(names, len(names)))


def _flight(name: str, rng: random.Random) -> str:
    return (
        f"Flight {rng.randrange(100, 1000)} to {name} leaves at {rng.randrange(6, 22)}:{rng.randrange(10, 60)} from "
        f"gate {rng.randrange(1, 60)}. It has {rng.randrange(2, 90)} free seats. A seat costs "
        f"{rng.randrange(60, 600)} dollars."
    )


def _article(name: str, rng: random.Random) -> str:
    return (
        f"The {name} has number {rng.randrange(1000, 10000)}. It weighs {rng.randrange(2, 60)} kilograms and costs "
        f"{rng.randrange(20, 900)} dollars. {rng.randrange(2, 80)} are in stock. It is sold by {rng.choice(_PEOPLE)}."
    )


def _employee(name: str, rng: random.Random) -> str:
    return (
        f"The {name} of team {rng.randrange(1, 30)} is {rng.choice(_PEOPLE)}, who came in {rng.randrange(1985, 2024)}. "
        f"Pay is {rng.randrange(15, 60)} dollars an hour, and leave is {rng.randrange(18, 35)} days. "
        f"Room {rng.randrange(100, 500)}."
    )


SHARED: Mapping[str, Callable[[random.Random], str]] = MappingProxyType(
    {
        "worked examples": _worked_examples,
        "other worked examples": _worked_examples,
        "tool descriptions": _tools,
        "pages of a novel": _novel,
    }
)
LISTS: Mapping[str, Callable[[random.Random], str]] = MappingProxyType(
    {
        "museums": _listed(museum_line, MUSEUMS),
        "flights": _listed(_flight, _CITIES),
        "articles": _listed(_article, _GOODS),
        "employees": _listed(_employee, _ROLES),
    }
)


def texts_of(kind: str) -> Mapping[str, Callable[[random.Random], str]]:
    """The texts that a kind of headers stands before, by name."""
    return LISTS if kind == "museum" else SHARED
