"""The results of `jointkv bench serve` as reports take them: complete in themselves, and set beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, TypeVar

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from jointkv.bench.result import ServingResult

S = TypeVar("S", bound=ServingResult)


class Serving(ServingResult):
    """A result with runs, all of which belong to its arms and loads."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problem = _contradiction(self)
        if problem is not None:
            raise PydanticCustomError("contradiction", "{problem}", {"problem": problem})
        return self


def _contradiction(result: ServingResult) -> str | None:
    """Why the parts of `result` do not belong together; None if they do."""
    if not result.runs:
        return "no run in it"
    arms, loads = [arm.name for arm in result.arms], [load.label for load in result.loads]
    seen = set()
    for run in result.runs:
        if run.arm not in arms or run.load not in loads:
            return f"a run of {run.arm} at {run.load}, which is not among its arms and loads"
        if (run.arm, run.load, run.round) in seen:
            return f"two runs of {run.arm} at {run.load} in round {run.round}"
        seen.add((run.arm, run.load, run.round))
        if len({len(values) for _, values in run.timeline if values is not None}) > 1:
            return f"the timeline of {run.arm} at {run.load}, round {run.round}, has lists of different lengths"
    return None


def conditions(result: ServingResult) -> dict[str, str]:
    """What must be equal for absolute numbers to be compared: model, its dtype, and the machine but for which cores."""
    machine = ", ".join(f"{name} {value}" for name, value in sorted(result.machine.items()) if name != "core_list")
    return {"model": result.model, "dtype": result.dtype, "machine": machine}


def comparable(results: Sequence[S]) -> list[list[S]]:
    """`results` in groups that may share a chart, each in the order given."""
    groups: dict[tuple[str, ...], list[S]] = {}
    for result in results:
        groups.setdefault(tuple(conditions(result).values()), []).append(result)
    return list(groups.values())
