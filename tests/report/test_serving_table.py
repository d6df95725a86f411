"""The table of all traffics: ratios to stock, pages, and answers that differ, told apart by how sure stock was."""

from __future__ import annotations

from pathlib import Path

import pytest

from jointkv.bench.result import NEAR_TIE, Divergence, Load
from jointkv.report.pictures import make_pictures
from jointkv.report.pictures.serving_table import LEAST_SHARE, ServingTable
from jointkv.report.serving.result import Serving
from tests.report import serving_samples as samples
from tests.report.serving_samples import FUSED, LARGE, STOCK

CLOSED, POISSON = Load(kind="closed", concurrency=16), Load(kind="poisson", rate=0.5)
PICTURE = ServingTable()


def differs(gap: float, request: int = 0, arm: str = "fused", token: int = 7, least: bool = False) -> Divergence:
    return Divergence(
        arm=arm,
        against="large_pool",
        load=CLOSED.label,
        round=1,
        request=request,
        token=token,
        gap=gap,
        least=least,
    )


def serving(traffic: str = "near_prefix", divergences: list[Divergence] | None = None) -> Serving:
    """Fusion computes half of the prompts, of which 24 were compared."""
    made = samples.result(
        loads=(CLOSED, POISSON),
        arms=(STOCK, FUSED, LARGE),
        rounds=1,
        traffic=traffic,
        divergences=[] if divergences is None else divergences,
    )
    runs = [
        run.model_copy(update={"prompt_tokens_computed": 9_600 if run.arm == "fused" else 19_200}) for run in made.runs
    ]
    return Serving.model_validate(made.model_copy(update={"runs": runs}).model_dump())


def cells(*results: Serving) -> list[dict[str, str]]:
    lines = [line for line in PICTURE.table(results).splitlines() if line.startswith("| ")]
    heads, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_a_line_per_traffic_load_and_arm_with_ratios_to_stock() -> None:
    found = cells(serving(), serving("names"))
    assert [(row["traffic"], row["load"], row["arm"]) for row in found] == [
        (f"{traffic}, pool 200", load, arm)
        for traffic in ("near-prefix", "names")
        for load in ("closed 16", "poisson 0.5/s")
        for arm in ("stock", "fused", "large pool")
    ]
    stock, fused, large = found[:3]
    assert [row["prompt tokens computed"] for row in found[:3]] == ["19,200", "9,600 (0.50)", "19,200 (1.00)"]
    speeds = [float(row["output tokens/s"].split()[0]) for row in (stock, fused)]
    assert float(fused["output tokens/s"].split()[1].strip("()")) == pytest.approx(speeds[1] / speeds[0], abs=0.01)
    assert stock["peak pages"] == "199" and large["peak pages"] == "416" and large["pages freed by merging"] == "-"


def test_a_near_tie_is_no_changed_answer() -> None:
    result = serving(
        divergences=[differs(NEAR_TIE), differs(2 * NEAR_TIE, 1), differs(0.02, 2), differs(0.0, 3, "stock")]
    )
    stock, fused, large, *_ = cells(result)
    chosen = ("near ties", "answers changed", "largest gap")
    assert [fused[name] for name in chosen] == ["2", "1", "0.2 at 7"]
    assert [stock[name] for name in chosen] == ["1", "0", "0 at 7"]
    assert {large[name] for name in (*chosen, "answers equal")} == {"-"}, "with which all others are compared"
    beyond = cells(serving(divergences=[differs(0.4), differs(0.01, 1, token=3, least=True)]))[1]
    assert beyond["answers changed"] == "2" and beyond["largest gap"] == "over 0.01 at 3"


def test_answers_that_nobody_was_asked_about_are_not_called_unchanged() -> None:
    result = serving().model_copy(update={"divergences": None})
    fused = cells(result)[1]
    assert fused["answers equal"].endswith("%") and fused["answers changed"] == fused["near ties"] == "-"
    figure = PICTURE.draw([result])
    assert figure is not None and not [line for line in figure.axes[3].lines if line.get_marker() != "None"]


def test_a_row_of_panels_per_kind_of_load_and_a_dot_per_arm() -> None:
    figure = PICTURE.draw([serving(divergences=[differs(1.0)]), serving("names")])
    assert figure is not None and len(figure.axes) == 8
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == ["closed loop", "Poisson arrivals"]
    assert [label.get_text() for label in figure.axes[4].get_yticklabels()] == ["near-prefix", "names"]
    computed, changed = figure.axes[2:4]
    dots = [line.get_xdata()[0] for line in computed.lines if line.get_marker() != "None"]
    assert dots == pytest.approx([0.5, 1.0] * 2), "stock is the line at 1"
    shares = [line.get_xdata()[0] for line in changed.lines if line.get_marker() != "None"]
    assert shares == pytest.approx([0, 1 / 24, 0, 0]) and changed.get_xlim()[1] > LEAST_SHARE


def test_loads_of_one_kind_are_named_and_lone_arms_left_out() -> None:
    result = Serving.model_validate(samples.result(loads=samples.CLOSED).model_dump())
    figure = PICTURE.draw([result])
    assert figure is not None
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [f"near-prefix, pool 200, {load.label}" for load in samples.CLOSED]
    alone = result.model_copy(update={"runs": [run for run in result.runs if run.arm == "stock"]})
    assert PICTURE.rows([alone]) == []


def test_what_is_to_be_known_first_stands_behind_the_lines_once() -> None:
    busy = serving("names")
    busy.runs[0] = busy.runs[0].model_copy(update={"foreign_cpu": 0.2})
    *_, first, second = PICTURE.table([serving(), busy]).splitlines()
    assert first == "- near-prefix, names: One round: the spread between rounds is not known."
    assert second.startswith("- names: Other processes took processor time, so times mislead in 1 of 6 runs: stock, ")


def test_other_machines_are_kept_apart(tmp_path: Path) -> None:
    one, other = serving(), serving("names").model_copy(update={"machine": {"processor": "another"}})
    files = [tmp_path / "one.json", tmp_path / "other.json"]
    for path, result in zip(files, (one, other), strict=True):
        path.write_text(result.model_dump_json())
    with pytest.raises(ValueError, match="cannot be put into one picture: machine"):
        make_pictures(files, tmp_path / "plots", ["serving_table"])
