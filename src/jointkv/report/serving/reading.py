"""Reading the files of a report, and which of them may share a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jointkv.bench.result import ServingResult
from jointkv.errors import BadInput


def read(path: Path) -> ServingResult:
    """The result in `path`.

    Raises:
        BadInput: no such file, not a result of `jointkv bench serve`, one without a run, or runs that contradict it.
    """
    result = ServingResult.load(path)
    if not result.runs:
        raise BadInput(f"{path}: no run in it")
    problem = contradiction(result)
    if problem:
        raise BadInput(f"{path}: {problem}")
    return result


def contradiction(result: ServingResult) -> str | None:
    """Why the parts of `result` do not belong together; None if they do."""
    arms, loads = [arm.name for arm in result.arms], [load.label for load in result.loads]
    seen = set()
    for run in result.runs:
        if run.arm not in arms or run.load not in loads:
            return f"a run of {run.arm} at {run.load}, which is not among its arms and loads"
        if (run.arm, run.load, run.round) in seen:
            return f"two runs of {run.arm} at {run.load} in round {run.round}"
        seen.add((run.arm, run.load, run.round))
        line = run.timeline
        lists = [line.seconds, line.running, line.waiting, line.pool_usage, line.preemptions, line.pages_freed]
        if len({len(values) for values in lists if values is not None}) > 1:
            return f"the timeline of {run.arm} at {run.load}, round {run.round}, has lists of different lengths"
    return None


def conditions(result: ServingResult) -> dict[str, str]:
    """What must be equal for absolute numbers to be compared: model, its dtype, and the machine but for which cores."""
    machine = ", ".join(f"{name} {value}" for name, value in sorted(result.machine.items()) if name != "core_list")
    return {"model": result.model, "dtype": result.dtype, "machine": machine}


def conflict(one: ServingResult, other: ServingResult) -> str | None:
    """Why the two must not share a chart, or None."""
    mine, theirs = conditions(one), conditions(other)
    return next((f"{name} {mine[name]} and {theirs[name]}" for name in mine if mine[name] != theirs[name]), None)


def comparable(results: Sequence[ServingResult]) -> list[list[ServingResult]]:
    """`results` in groups that may share a chart, each in the order given."""
    groups: dict[tuple[str, ...], list[ServingResult]] = {}
    for result in results:
        groups.setdefault(tuple(conditions(result).values()), []).append(result)
    return list(groups.values())
