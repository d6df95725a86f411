"""What a reader must know before trusting the numbers of a result."""

from __future__ import annotations

from collections.abc import Callable

from jointkv.bench.result import Run, ServingResult
from jointkv.report.serving.pairs import called, fusion_pairs
from jointkv.vllm_plugin.settings import PluginSettings

QUIET = 0.05
"""Above this part of the cores' time in other processes the times of a run mislead."""


def cautions(result: ServingResult) -> list[str]:
    """One sentence for each; none for a complete, undisturbed result without failures."""
    planned = len(result.arms) * len(result.loads) * result.rounds
    pairs = fusion_pairs(result)
    found = []
    if not result.complete or len(result.runs) < planned:
        found.append(f"Partial: the benchmark was interrupted or failed after {len(result.runs)} of {planned} runs.")
    for what, which in (
        ("Requests failed", lambda run: run.failed > 0),
        ("Other processes took processor time, so times mislead", lambda run: (run.foreign_cpu or 0) > QUIET),
        ("Fusion had faults and switched itself off", _had_faults),
        ("No licence was held and nothing skipped, which a warm-up or a profile changes,", _idle(result)),
        ("A licence was lost", lambda run: run.reuse is not None and run.reuse.licences_lost > 0),
        ("More of the audited blocks were beyond the bounds than were to be", _missed(result)),
    ):
        runs = [f"{run.arm}, {run.load}, round {run.round}" for run in result.runs if which(run)]
        if runs:
            found.append(f"{what} in {len(runs)} of {len(result.runs)} runs: {'; '.join(runs)}.")
    if not pairs:
        found.append("No arm with fusion and one without: nothing to compare.")
    for pair in pairs:
        if pair.differences:
            different = " and ".join(pair.differences)
            found.append(f"{called(pair.upper)} and {called(pair.lower)} differ in more than fusion: {different}.")
    if result.rounds < 2:
        found.append("One round: the spread between rounds is not known.")
    return found


def _had_faults(run: Run) -> bool:
    return any(count > 0 for name, count in (run.fusion or {}).items() if "fault" in name)


def _idle(result: ServingResult) -> Callable[[Run], bool]:
    licensed = {arm.name for arm in result.arms if (arm.fusion or {}).get("reuse") == "licensed"}

    def idle(run: Run) -> bool:
        return run.arm in licensed and run.reuse is not None and not (run.reuse.skipped_tokens or run.reuse.licences)

    return idle


def _missed(result: ServingResult) -> Callable[[Run], bool]:
    default = PluginSettings.model_fields["reuse_miss_rate"].default
    allowed = {arm.name: (arm.fusion or {}).get("reuse_miss_rate", default) for arm in result.arms if arm.reuses}

    def missed(run: Run) -> bool:
        rate = None if run.reuse is None else run.reuse.miss_rate
        return run.arm in allowed and rate is not None and rate > allowed[run.arm]

    return missed
