"""What a reader must know before trusting the numbers of a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jointkv.bench.result import Run, ServingResult
from jointkv.report.serving.pairs import called, fusion_pairs, loads_run

QUIET = 0.05
"""Above this part of the cores' time in other processes the times of a run mislead."""


def cautions(result: ServingResult) -> list[str]:
    """One sentence for each; none for a complete, undisturbed result without failures."""
    pairs = fusion_pairs(result)
    found = [_partial(result), *(_which(result.runs, *rule) for rule in _RULES)]
    if not pairs:
        found.append("No arm with fusion and one without: nothing to compare.")
    for pair in pairs:
        if pair.differences:
            different = " and ".join(pair.differences)
            found.append(f"{called(pair.upper)} and {called(pair.lower)} differ in more than fusion: {different}.")
        if not loads_run(result, (pair.upper, pair.lower)):
            found.append(f"{called(pair.upper)} and {called(pair.lower)} have no load in common yet.")
    if result.rounds < 2:
        found.append("One round: the spread between rounds is not known.")
    return [sentence for sentence in found if sentence]


def _partial(result: ServingResult) -> str:
    planned = len(result.arms) * len(result.loads) * result.rounds
    if result.complete and len(result.runs) >= planned:
        return ""
    missing = f"{len(result.runs)} of {planned} runs are in it"
    return f"Partial result, of a benchmark that was interrupted or failed: {missing}."


def _failed(run: Run) -> str:
    return f"{run.failed} of {run.completed + run.failed} requests" if run.failed else ""


def _disturbed(run: Run) -> str:
    return (
        f"{run.foreign_cpu:.0%} of the cores' time" if run.foreign_cpu is not None and run.foreign_cpu > QUIET else ""
    )


def _faults(run: Run) -> str:
    count = sum(value for name, value in (run.fusion or {}).items() if "fault" in name)
    return f"{count:.0f}" if count > 0 else ""


_RULES: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("Requests failed", _failed),
    ("Disturbed: other processes took processor time, so times mislead", _disturbed),
    ("Fusion had faults and switched itself off", _faults),
)


def _which(runs: Sequence[Run], what: str, test: Callable[[Run], str]) -> str:
    """`what` and the runs that `test` has words on."""
    found = [f"{run.arm}, {run.load}, round {run.round}: {words}" for run in runs if (words := test(run))]
    return f"{what} in {len(found)} of {len(runs)} runs ({'; '.join(found)})." if found else ""
