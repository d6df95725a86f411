"""Arms made to give the reference's answers, with a stub for the engine; a real one is in `test_real_engine.py`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jointkv.bench import scoring
from jointkv.bench.plan import Plan
from jointkv.bench.requests import ServingRequest
from jointkv.bench.run import make_result
from jointkv.bench.scoring import ScoringFailed, compare_with_truth, require_reference, runner, spec_of, with_scores
from jointkv.errors import BadInput
from tests.bench.plans import CLOSED, POISSON, arm, plan, run

STUB = Path(__file__).with_name("stub_scoring.py")
ARMS = (arm("stock"), arm("fused", fusion={"a": 1}), arm("other", 50, fusion={"a": 1, "b": 2}, flags=["--x"]))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(scoring, "COMMAND", (sys.executable, str(STUB)))
    drawn = plan(rounds=1, loads=(CLOSED,))
    return replace(drawn, arms=ARMS, block_bytes={each.name: 64 for each in ARMS})


def result_of(made: Plan, outputs: Any = None) -> Any:
    runs = {(each.name, "closed 2", 1): run(each.name) for each in made.arms}
    return make_result(made, SimpleNamespace(runs=runs, outputs=outputs or {}), complete=True)  # type: ignore[arg-type]


def run_of(made: Plan, said: list[str]) -> Any:
    @contextmanager
    def stages(first: str) -> Iterator[Any]:
        said.append(first)
        yield said.append

    return runner(os.environ, made, {0}, stages)


def test_every_other_arm_is_held_against_the_reference(made: Plan) -> None:
    said: list[str] = []
    scores = with_scores(result_of(made), made, run_of(made, said), 2).scores or []
    assert [(row.arm, row.against, row.pages_freed) for row in scores] == [("fused", "stock", 1), ("other", "stock", 2)]
    assert (scores[0].kl, scores[0].kl_worst_request, scores[1].kl) == (1.5, 2.0, 3.0)
    assert (scores[0].top1, scores[0].nll, scores[0].nll_reference) == (0.5, 6 / 8, 4 / 8)
    assert [line for line in said if ":" not in line] == ["scoring stock", "scoring fused", "scoring other"]
    assert "scoring other: 2 of 2 requests" in said
    first, _ = with_scores(result_of(made), made, run_of(made, said), 1).scores or ()
    assert (first.requests, first.kl) == (1, 1.0)


def test_what_an_engine_is_told(made: Plan, tmp_path: Path) -> None:
    warm = replace(made, warmup=(ServingRequest((7,), 30, salt="a"),))
    spec = spec_of(warm, ARMS[2], tmp_path / "answers", writes=False)
    assert spec.arguments == ["folder", "--seed", "5", "--num-gpu-blocks-override", "50", "--x"]
    assert (spec.options, spec.at_once, spec.writes) == ({"a": 1, "b": 2}, 2, False)
    assert spec.requests == [([1, 2], 4, None), ([3], 4, None)] and spec.warmup == [([7], 8, "a")]
    assert spec_of(replace(made, loads=(POISSON,)), ARMS[0], tmp_path, writes=True).at_once == 2


def test_an_engine_that_fails_is_named(made: Plan) -> None:
    dies = replace(made, arms=(*ARMS[:2], arm("gone", fusion={"a": 1}, flags=["--die"])))
    dies = replace(dies, block_bytes={each.name: 64 for each in dies.arms})
    with pytest.raises(ScoringFailed, match="arm gone could not be scored: ValueError: no such model"):
        with_scores(result_of(dies), dies, run_of(dies, []), 2)


def test_a_reference_that_fuses_is_refused(made: Plan) -> None:
    assert require_reference(made) == ARMS[0]
    with pytest.raises(BadInput, match="add --arm stock"):
        require_reference(replace(made, arms=ARMS[1:]))


def test_texts_beside_true_answers(made: Plan) -> None:
    requests = [ServingRequest((1,), 4, answer=answer) for answer in ("a red pen", None, "no")]
    outputs = {("fused", "closed 2", 1): ["the red pen", "x", "no"], ("fused", "closed 2", 2): ["blue", "x", "no"]}
    (row,) = compare_with_truth(outputs, requests, ARMS, [CLOSED])
    assert (row.arm, row.load, row.answers, row.f1) == ("fused", "closed 2", 4, 3 / 4)
    assert result_of(made, {("stock", "closed 2", 1): ["a", "b"]}).true_answers == []
