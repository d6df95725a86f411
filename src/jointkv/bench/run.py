"""The schedule of a serving benchmark: rounds, in each the arms in turns, for each a server, in it all loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointkv.bench.fidelity import compare_outputs
from jointkv.bench.load_generator import LoadFailed
from jointkv.bench.measure import warm_up
from jointkv.bench.quick import QUIET
from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Arm, Load, Run, ServingResult
from jointkv.bench.schedule import Watcher, about, round_order, seconds_left
from jointkv.bench.server import Server, ServerFailed, server_command
from jointkv.bench.state import RunFolder
from jointkv.bench.statistics import compare
from jointkv.system.machine import on_cores

START = "starting the server"


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        block_bytes: bytes of a block of the pool, by arm.
        model: the name it is served under.
        location: its folder or hub name.
        seed: of the arrivals in the first round; every later round takes the next one, the same in all arms.
        facts: the fields of `ServingResult` that are known beforehand.
    """

    arms: tuple[Arm, ...]
    loads: tuple[Load, ...]
    rounds: int
    requests: tuple[ServingRequest, ...]
    block_bytes: Mapping[str, int]
    model: str
    location: str
    seed: int
    facts: Mapping[str, Any]

    def schedule(self) -> list[tuple[int, Arm]]:
        """Rounds, from 1, and arms: one server each, in the order of execution."""
        return [(number + 1, arm) for number in range(self.rounds) for arm in round_order(self.arms, number)]

    def position(self, number: int, arm: Arm, load: Load) -> int:
        """Place of a run in the order of execution, from 0; more rounds do not change it."""
        return self.schedule().index((number, arm)) * len(self.loads) + self.loads.index(load)

    def open_loads(self, folder: RunFolder, number: int, arm: Arm) -> list[Load]:
        """The loads that were not run yet in this round with this arm."""
        return [load for load in self.loads if (arm.name, load.label, number) not in folder.runs]

    def steps(self, folder: RunFolder) -> int:
        """How many server starts and runs are left."""
        open_loads = [len(self.open_loads(folder, number, arm)) for number, arm in self.schedule()]
        return sum(loads + 1 for loads in open_loads if loads)


Serve = Callable[[Arm, int], AbstractContextManager[Any]]
"""Starts and warms up the server of an arm in a round; it ends with the context."""


Measure = Callable[..., tuple[Run, list[str]]]
"""See `jointkv.bench.measure.measure`."""


def run_plan(plan: Plan, folder: RunFolder, serve: Serve, measure: Measure, watcher: Watcher) -> ServingResult:
    """Run what `folder` does not have yet; its result file is written after every run.

    Raises:
        ServerFailed, LoadFailed: with arm and round; everything up to then is kept.
    """
    clock = _Clock(plan, folder, watcher)
    for number, arm in plan.schedule():
        loads = plan.open_loads(folder, number, arm)
        if not loads:
            continue
        try:
            clock.next()
            with serve(arm, number) as server:
                for load in loads:
                    title = clock.next()
                    server.reset_prefix_cache()
                    run, texts = measure(
                        server,
                        arm,
                        load,
                        plan.requests,
                        model=plan.model,
                        tokenizer=plan.location,
                        round=number,
                        position=plan.position(number, arm, load),
                        block_bytes=plan.block_bytes[arm.name],
                        seed=plan.seed + number - 1,
                        progress=lambda done: watcher.part(done / len(plan.requests)),
                    )
                    folder.save(run, texts)
                    folder.write_result(make_result(plan, folder, complete=False))
                    _say(watcher, title, run)
        except (ServerFailed, LoadFailed) as error:
            raise type(error)(f"arm {arm.name} failed in round {number}: {error}") from error
    result = make_result(plan, folder, complete=True)
    folder.write_result(result)
    return result


def make_result(plan: Plan, folder: RunFolder, complete: bool) -> ServingResult:
    """What the runs of the plan that are in `folder` say."""
    wanted = {
        (arm.name, load.label, number) for number, arm in plan.schedule() for load in plan.loads
    } & folder.runs.keys()
    runs = sorted((folder.runs[key] for key in wanted), key=lambda run: run.position)
    return ServingResult(
        **plan.facts,
        complete=complete,
        rounds=plan.rounds,
        arms=list(plan.arms),
        loads=list(plan.loads),
        runs=runs,
        fidelity=compare_outputs({key: folder.outputs[key] for key in wanted}, plan.arms, plan.loads),
        comparisons=compare(runs, plan.arms, plan.loads),
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
        command = server_command(plan.location, arm.fusion, ["--served-model-name", plan.model, *flags])
        with Server(command, environment, port, logs / f"{arm.name}-{number}.log") as server:
            with on_cores(cores):
                server.start(timeout)
            warm_up(server, plan.model, plan.requests)
            yield server

    return serve


class _Clock:
    """The steps of a plan that are still to be made, and how long those made took, by kind and arm."""

    def __init__(self, plan: Plan, folder: RunFolder, watcher: Watcher) -> None:
        self._watcher, self._started = watcher, 0.0
        self._steps: list[tuple[str, str, str]] = []
        for number, arm in plan.schedule():
            loads = plan.open_loads(folder, number, arm)
            for kind in [START] * bool(loads) + [load.label for load in loads]:
                self._steps.append((f"round {number} of {plan.rounds}, {arm.name}, {kind}", kind, arm.name))
        self._next = 0
        self._spent: dict[str, dict[str, list[float]]] = {}
        for run in folder.runs.values():
            self._spent.setdefault(run.load, {}).setdefault(run.arm, []).append(run.seconds)

    def next(self) -> str:
        """The step before is done; announces the next one and returns its title."""
        now = time.monotonic()
        if self._next:
            _, kind, arm = self._steps[self._next - 1]
            self._spent.setdefault(kind, {}).setdefault(arm, []).append(now - self._started)
        left = self._left(self._steps[self._next :])
        title = self._steps[self._next][0]
        self._watcher.start(title + ("" if left is None else f"; {about(left)} left"))
        self._next, self._started = self._next + 1, now
        return title

    def _left(self, steps: Sequence[tuple[str, str, str]]) -> float | None:
        """None until every kind of step was made once."""
        total = 0.0
        for wanted in {kind for _, kind, _ in steps}:
            seconds = seconds_left(self._spent.get(wanted, {}), [arm for _, kind, arm in steps if kind == wanted])
            if seconds is None:
                return None
            total += seconds
        return total


def _say(watcher: Watcher, title: str, run: Run) -> None:
    if run.foreign_cpu is not None and run.foreign_cpu > QUIET:
        watcher.say(f"{title}: other processes took {run.foreign_cpu:.0%} of the cores; times of this run mislead")
    failed = f", {run.failed} requests failed" if run.failed else ""
    watcher.say(
        f"{title}: {run.output_tokens_per_s:.1f} output tokens/s, TTFT p95 {run.ttft.p95:.1f} s, "
        f"at most {run.running_peak:.0f} running, {run.preemptions} preemptions{failed}"
    )
