"""The schedule with servers that are none: order, resuming, failures, and what is kept."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jointkv.bench.load_generator import LoadFailed
from jointkv.bench.plan import Plan
from jointkv.bench.result import Arm, Load, Run, ServingResult
from jointkv.bench.run import run_plan, steps_left
from jointkv.bench.run_folder import RunFolder
from jointkv.bench.server import ServerFailed
from jointkv.errors import BadInput
from tests.bench.plans import CLOSED, POISSON, plan, run


class World:
    """Servers and loads that only write down what happens; `fails` says where something goes wrong instead."""

    def __init__(self, folder: Path, fails: dict[tuple[str, int, str], BaseException] | None = None) -> None:
        self.folder, self.fails = folder, fails or {}
        self.events: list[str] = []
        self.announced: list[str] = []
        self.said: list[str] = []
        self.up = 0

    @contextmanager
    def serve(self, arm: Arm, number: int) -> Iterator["World"]:
        self.events.append(f"start {arm.name} {number}")
        self._fail(arm, number, "start")
        self.up += 1
        assert self.up == 1, "two servers at a time"
        try:
            yield self
        finally:
            self.up -= 1

    def reset_prefix_cache(self) -> None:
        self.events.append("reset")

    def measure(
        self, plan: Plan, server: Any, arm: Arm, load: Load, number: int, progress: Any
    ) -> tuple[Run, list[str]]:
        assert server is self and self.events[-1] == "reset"
        self.events[-1] = f"{arm.name} {number} {load.label}"
        self._fail(arm, number, load.label)
        progress(1)
        speed = {"stock": 4.0, "fused": 6.0}[arm.name]
        position = plan.position(number, arm, load)
        made = run(arm.name, load, number, position=position, output_tokens_per_s=speed, foreign_cpu=0.2)
        return made, [f"{arm.name} one", "two"]

    def _fail(self, arm: Arm, number: int, what: str) -> None:
        problem = self.fails.get((arm.name, number, what))
        if problem is not None:
            # What the user finds when it stops here.
            raise problem

    def start(self, description: str) -> None:
        self.announced.append(description)

    def part(self, fraction: float) -> None:
        assert fraction == 0.5

    def say(self, line: str) -> None:
        self.said.append(line)

    def go(self, chosen: Plan, fresh: bool = False) -> ServingResult:
        folder = RunFolder(self.folder, chosen.settings(), fresh)
        return run_plan(chosen, folder, self.serve, self.measure, self)

    def partial(self) -> ServingResult:
        return ServingResult.load(self.folder / "serving.json")


def test_arms_take_turns_and_loads_share_a_server(tmp_path: Path) -> None:
    world = World(tmp_path)
    result = world.go(plan())
    assert world.events == [
        *("start stock 1", "stock 1 closed 2", "stock 1 poisson 0.5/s"),
        *("start fused 1", "fused 1 closed 2", "fused 1 poisson 0.5/s"),
        *("start fused 2", "fused 2 closed 2", "fused 2 poisson 0.5/s"),
        *("start stock 2", "stock 2 closed 2", "stock 2 poisson 0.5/s"),
    ]
    assert [one.position for one in result.runs] == list(range(8))
    assert result.complete and result == world.partial()
    speed = [row for row in result.comparisons if row.metric == "output_tokens_per_s"]
    assert [(row.load, row.ratios) for row in speed] == [("closed 2", [1.5, 1.5]), ("poisson 0.5/s", [1.5, 1.5])]
    equal = {(row.arm, row.against): row.equal for row in result.fidelity if row.load == "closed 2"}
    assert equal == {("fused", "stock"): 0.5, ("stock", "stock"): 1.0, ("fused", "fused"): 1.0}
    texts = json.loads((tmp_path / (result.runs[0].outputs_file or "")).read_text())
    assert texts == ["stock one", "two"]
    assert any("other processes took 20% of the cores" in line for line in world.said)


def test_progress_says_what_is_left(tmp_path: Path) -> None:
    world = World(tmp_path)
    chosen = plan(loads=(CLOSED,))
    assert len(steps_left(chosen, RunFolder(tmp_path, chosen.settings()))) == 8
    world.go(chosen)
    assert len(world.announced) == 8
    assert world.announced[:2] == ["round 1 of 2, stock, starting the server", "round 1 of 2, stock, closed 2"]
    assert world.announced[2] == "round 1 of 2, fused, starting the server; about 0 s left"


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), ServerFailed("its log"), LoadFailed("no answer")])
@pytest.mark.parametrize("where", ["start", "closed 2", "poisson 0.5/s"])
def test_what_stopped_goes_on_where_it_was(tmp_path: Path, problem: BaseException, where: str) -> None:
    world = World(tmp_path, {("fused", 2, where): problem})
    with pytest.raises(type(problem)) as raised:
        world.go(plan())
    if not isinstance(problem, KeyboardInterrupt):
        assert str(raised.value) == f"arm fused failed in round 2: {problem}"
    assert world.up == 0
    done = {"start": 4, "closed 2": 4, "poisson 0.5/s": 5}[where]
    assert len(world.partial().runs) == done and not world.partial().complete

    again = World(tmp_path)
    result = again.go(plan())
    assert [event for event in again.events if "start" in event] == ["start fused 2", "start stock 2"]
    assert len([event for event in again.events if "start" not in event]) == 8 - done
    assert result.complete and [one.position for one in result.runs] == list(range(8))

    third = World(tmp_path)
    assert third.go(plan()) == result and third.events == []


def test_a_failure_of_the_first_server_leaves_a_usable_folder(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed):
        World(tmp_path, {("stock", 1, "start"): ServerFailed("x")}).go(plan())
    assert World(tmp_path).go(plan(rounds=1)).complete


def test_more_rounds_go_on_and_fewer_leave_out(tmp_path: Path) -> None:
    World(tmp_path).go(plan(rounds=2))
    world = World(tmp_path)
    assert len(world.go(plan(rounds=3)).runs) == 12
    assert [event for event in world.events if "start" in event] == ["start stock 3", "start fused 3"]
    first = World(tmp_path).go(plan(rounds=1))
    assert {one.round for one in first.runs} == {1} and {row.pairs for row in first.fidelity} == {2}


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    World(tmp_path).go(plan())
    world = World(tmp_path)
    other = plan(loads=(CLOSED,))
    with pytest.raises(BadInput, match=r'other settings \(loads; loads was \["closed 2", .*--fresh'):
        world.go(other)
    assert world.events == [] and len(world.partial().runs) == 8
    assert len(world.go(other, fresh=True).runs) == 4


def test_settings_tell_requests_and_profiles_apart(tmp_path: Path) -> None:
    from dataclasses import replace

    profile = tmp_path / "profile.json"
    profile.write_text("one")
    base = plan()
    fused = base.arms[1].model_copy(update={"fusion": {"profile": str(profile)}})
    first = replace(base, arms=(base.arms[0], fused))
    before = first.settings()
    profile.write_text("two")
    assert first.settings() != before
    assert replace(base, requests=base.requests[::-1]).settings() != base.settings()
    assert replace(base, rounds=9).settings() == base.settings()


def test_runs_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    World(tmp_path).go(plan())
    (tmp_path / "settings.json").unlink()
    with pytest.raises(BadInput, match=r"has runs, and no settings\.json"):
        World(tmp_path).go(plan())


def test_a_broken_run_file_is_named(tmp_path: Path) -> None:
    World(tmp_path).go(plan())
    file = tmp_path / "runs" / "fused-poisson-0.5-s-2.json"
    file.write_text("{")
    with pytest.raises(BadInput, match=r"fused-poisson-0\.5-s-2\.json cannot be read"):
        World(tmp_path).go(plan())
    file.unlink()
    world = World(tmp_path)
    assert world.go(plan()).complete
    assert world.events == ["start fused 2", "fused 2 poisson 0.5/s"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot use the folder"):
        World(tmp_path / "file").go(plan())


def test_labels_become_different_files(tmp_path: Path) -> None:
    loads = (CLOSED, POISSON, Load(kind="bursty", rate=0.5, burstiness=0.3), Load(kind="replay", speed=0.5))
    World(tmp_path).go(plan(rounds=1, loads=loads, names=("stock",)))
    assert len([*(tmp_path / "runs").glob("*.outputs.json")]) == 4
