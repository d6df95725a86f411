"""Runs a plan: rounds, in each the arms in turns, for each a server, in it all loads."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from jointkv.bench.arms import STORE
from jointkv.bench.fidelity import compare_outputs
from jointkv.bench.load_generator import LoadFailed
from jointkv.bench.plan import Plan
from jointkv.bench.result import Arm, Run, ServingResult
from jointkv.bench.run_folder import RunFolder
from jointkv.bench.scoring import compare_with_truth
from jointkv.bench.server import Server, ServerFailed, server_command
from jointkv.bench.statistics import compare
from jointkv.bench.warm import fill, warm_up
from jointkv.system.machine import on_cores

START = "starting the server"
QUIET = 0.05
"""Above this part of the cores' time in other processes a run is reported as disturbed."""

Serve = Callable[[Arm, int], AbstractContextManager[Any]]
"""Starts and warms up the server of an arm in a round; it ends with the context."""

Measure = Callable[..., tuple[Run, list[str]]]
"""See `jointkv.bench.measure.measure`."""


class Watcher(Protocol):
    """Where progress goes."""

    def start(self, description: str) -> None:
        """The next step begins."""

    def part(self, fraction: float) -> None:
        """Of the present step `fraction` is done."""

    def say(self, line: str) -> None:
        """A line that stays."""


def run_plan(plan: Plan, folder: RunFolder, serve: Serve, measure: Measure, watcher: Watcher) -> ServingResult:
    """Run what `folder` does not have yet; its result file is written after every run.

    Raises:
        ServerFailed, LoadFailed: with arm and round; everything up to then is kept.
    """
    clock = _Clock(plan, folder, watcher)
    for number, arm, loads in plan.left(folder.runs):
        try:
            clock.next()
            with serve(arm, number) as server:
                for load in loads:
                    title = clock.next()
                    server.reset_prefix_cache()
                    run, texts = measure(
                        plan, server, arm, load, number, lambda done: watcher.part(done / len(plan.requests))
                    )
                    folder.save(run, texts)
                    folder.write_result(make_result(plan, folder, complete=False))
                    _say(watcher, title, run)
        except (ServerFailed, LoadFailed) as error:
            raise type(error)(f"arm {arm.name} failed in round {number}: {error}") from error
    result = folder.with_what_was_asked(make_result(plan, folder, complete=True))
    folder.write_result(result)
    return result


def steps_left(plan: Plan, folder: RunFolder) -> list[tuple[str, str]]:
    """Titles and kinds of the server starts and runs that `folder` does not have yet, in the order of execution."""
    return [
        (f"round {number} of {plan.rounds}, {arm.name}, {kind}", kind)
        for number, arm, loads in plan.left(folder.runs)
        for kind in (START, *(load.label for load in loads))
    ]


def make_result(plan: Plan, folder: RunFolder, complete: bool) -> ServingResult:
    """What the runs of the plan that are in `folder` say."""
    wanted = {(arm.name, load.label, number) for number, arm in plan.schedule() for load in plan.loads}
    runs = sorted((run for key, run in folder.runs.items() if key in wanted), key=lambda run: run.position)
    outputs = {key: texts for key, texts in folder.outputs.items() if key in wanted}
    return ServingResult(
        **plan.facts,
        complete=complete,
        rounds=plan.rounds,
        arms=list(plan.arms),
        loads=list(plan.loads),
        runs=runs,
        fidelity=compare_outputs(outputs, plan.arms, plan.loads),
        comparisons=compare(runs, plan.arms, plan.loads),
        true_answers=compare_with_truth(outputs, plan.requests, plan.arms, plan.loads),
    )


def server_starter(
    plan: Plan, environment: Mapping[str, str], cores: Collection[int], port: int, timeout: float, logs: Path
) -> Serve:
    """How `run_plan` starts real servers, on `cores`, with logs in the folder `logs`.

    Args:
        timeout: seconds that a start may take.
    """

    @contextmanager
    def serve(arm: Arm, number: int) -> Iterator[Server]:
        flags = [*plan.facts["common_flags"], "--num-gpu-blocks-override", str(arm.pool_blocks), *arm.flags]
        fusion, store = _with_store(arm, logs.parent)
        command = server_command(plan.location, fusion, ["--served-model-name", plan.model, *flags])
        with Server(command, environment, port, logs / f"{arm.name}-{number}.log") as server:
            with on_cores(cores):
                server.start(timeout)
            if store is not None:
                fill(server, plan, store)
            warm_up(server, plan.model, plan.requests)
            yield server

    return serve


def _with_store(arm: Arm, folder: Path) -> tuple[dict[str, Any] | None, Path | None]:
    """The options of an arm and the folder of its stored pages, if it has one; by default one within `folder`."""
    if arm.fusion is None or arm.fusion.get("store") is None:
        return arm.fusion, None
    store = folder / STORE if arm.fusion["store"] == STORE else Path(arm.fusion["store"])
    return {**arm.fusion, "store": str(store)}, store


class _Clock:
    """Announces the steps that are left, with an estimate of the time they take: the mean of their kind so far."""

    def __init__(self, plan: Plan, folder: RunFolder, watcher: Watcher) -> None:
        self._watcher, self._steps, self._next, self._started = watcher, steps_left(plan, folder), 0, 0.0
        self._spent: dict[str, list[float]] = defaultdict(list)
        for run in folder.runs.values():
            self._spent[run.load].append(run.seconds + (run.warmup.seconds if run.warmup else 0.0))

    def next(self) -> str:
        """The step before is done; announces the next one and returns its title."""
        now = time.monotonic()
        if self._next:
            self._spent[self._steps[self._next - 1][1]].append(now - self._started)
        kinds = [kind for _, kind in self._steps[self._next :]]
        title, left = self._steps[self._next][0], ""
        if self._spent.keys() >= set(kinds):
            seconds = sum(fmean(self._spent[kind]) for kind in kinds)
            left = f"; about {seconds / 60:.0f} min left" if seconds >= 90 else f"; about {seconds:.0f} s left"
        self._watcher.start(title + left)
        self._next, self._started = self._next + 1, now
        return title


def _say(watcher: Watcher, title: str, run: Run) -> None:
    if run.foreign_cpu is not None and run.foreign_cpu > QUIET:
        watcher.say(f"{title}: other processes took {run.foreign_cpu:.0%} of the cores; times of this run mislead")
    failed = f", {run.failed} requests failed" if run.failed else ""
    watcher.say(
        f"{title}: TTFT p95 {run.ttft.p95:.1f} s, {run.output_tokens_per_s:.1f} output tokens/s, "
        f"at most {run.running_peak:.0f} running, {run.preemptions} preemptions{_skipped(run)}{_loaded(run)}{failed}"
    )


def _skipped(run: Run) -> str:
    if run.reuse is None or run.skipped_share is None or not (run.reuse.skipped_tokens or run.reuse.audits):
        return ""
    audited = f"{run.reuse.missed_blocks} of {run.reuse.audited_blocks} audited blocks beyond the bounds"
    return f", {run.skipped_share:.0%} of prompt tokens skipped, {audited}"


def _loaded(run: Run) -> str:
    if run.stored is None:
        return ""
    read, written = (amount / 1e6 for amount in (run.stored.bytes_read, run.stored.bytes_written))
    return f", {run.stored.tokens_loaded:,} tokens loaded ({read:,.0f} MB read, {written:,.0f} MB written)"
