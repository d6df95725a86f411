"""Pictures and tables from JSON results: made, joined, equal to the JSON, and all or nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jointkv.errors import BadInput
from jointkv.report.pictures import PICTURES, make_pictures
from jointkv.report.pictures.kl_against_bytes import KLAgainstBytes
from jointkv.report.results import read_result
from tests.report import samples

PNG = b"\x89PNG\r\n"
Result = dict[str, Any]
UNFINISHED = {"traffic": "names", "target": "kl=0.005", "seed": 0, "met": False}


def evaluation() -> Result:
    return samples.evaluation(("near_prefix", "unrelated"))


def lines(markdown: str) -> list[list[str]]:
    """The cells of a Markdown table, without heading and rule."""
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| ---")
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows[2:]]


def table(name: str, folder: Path, *results: Result) -> list[list[str]]:
    """The lines of the table of the picture `name`, without drawing it."""
    picture = next(picture for picture in PICTURES if picture.name == name)
    read = [read_result(path) for path in samples.save(folder, **{f"r{i}": each for i, each in enumerate(results)})]
    return lines(picture.table(read))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (evaluation, {"kl_against_bytes", "task_scores"}),
        (samples.curves, {"rate_distortion", "layer_map"}),
        (samples.calibrations, {"predicted_against_measured"}),
        (samples.paper, {"paper_batch", "paper_chunk", "paper_layers"}),
    ],
)
def test_every_format_has_its_pictures_and_tables(make: Callable[[], Result], names: set[str], tmp_path: Path) -> None:
    written = make_pictures(samples.save(tmp_path, result=make()), tmp_path / "new" / "plots")
    assert set(written) == {tmp_path / "new" / "plots" / f"{name}.{kind}" for name in names for kind in ("png", "md")}
    assert sorted(written) == sorted((tmp_path / "new" / "plots").iterdir())
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(PNG) and path.stat().st_size > 10_000
        else:
            widths = {len(row) for row in lines(path.read_text())}
            assert len(widths) == 1 and widths != {0}


def test_names_of_pictures_differ() -> None:
    assert len({picture.name for picture in PICTURES}) == len(PICTURES)


def test_methods_table_equals_the_json(tmp_path: Path) -> None:
    result = evaluation()
    found = table("kl_against_bytes", tmp_path, result)
    assert len(found) == len(result["rows"])
    for cells, row in zip(found, result["rows"], strict=True):
        assert cells[:3] == [row["traffic"].replace("_", "-"), row["method"], f"{row['level']:g}"]
        assert cells[3:5] == ["yes" if row[key] else "no" for key in ("shares_across_requests", "frees_engine_memory")]
        if row["not_run"]:
            assert cells[5] == "not run: TypeError: forward() got a \\| and a second line"
            assert set(cells[-6:]) == {"-"}
            continue
        assert cells[5] == row["counted"]
        assert float(cells[6].rstrip("%")) == pytest.approx(100 * (1 - row["share_16bit"]), abs=0.051)
        assert float(cells[7]) == pytest.approx(row["kl"], rel=5e-3)
        assert float(cells[8]) == pytest.approx(row["kl_worst_request"], rel=5e-3)
        assert float(cells[9]) == pytest.approx(row["top1"], abs=5e-4)
        assert cells[10] == f"{row['nll']:.4f} ({row['nll_reference']:.4f})"
        assert cells[11] == f"{row['common_prefix']:.1f} of 32"


def test_savings_are_those_at_16_bits(tmp_path: Path) -> None:
    result = evaluation()
    result["rows"] = [{**result["rows"][0], "share": 0.1, "share_16bit": 0.75}]
    result["tasks"] = []
    paths = samples.save(tmp_path, result=result)
    assert table("kl_against_bytes", tmp_path, result)[0][6] == "25.0%"
    figure = KLAgainstBytes().draw([read_result(paths[0])])  # type: ignore[list-item]
    assert figure is not None
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.25, 0.0]]


def test_sharing_methods_are_solid_and_the_others_dashed(tmp_path: Path) -> None:
    (path,) = samples.save(tmp_path, result=evaluation())
    figure = KLAgainstBytes().draw([read_result(path)])  # type: ignore[list-item]
    assert figure is not None
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert {name: styles[name] for name, *_ in samples.METHODS} == {
        name: "-" if shares else "--" for name, shares, *_ in samples.METHODS
    }
    assert "0" in [label.get_text().strip("$").replace("\\mathdefault{0}", "0") for label in _ticks(figure.axes[0])]


def _ticks(axes: Any) -> list[Any]:
    axes.figure.canvas.draw()
    return list(axes.get_yticklabels())


def test_nothing_measured_leaves_the_table(tmp_path: Path) -> None:
    result = evaluation()
    result["rows"] = [row for row in result["rows"] if row["not_run"]]
    result["tasks"] = [score for score in result["tasks"] if score["difference"] is None]
    written = make_pictures(samples.save(tmp_path, result=result), tmp_path / "plots")
    assert sorted(path.name for path in written) == ["kl_against_bytes.md", "task_scores.md"]


def test_task_table_names_differences_and_stand_ins(tmp_path: Path) -> None:
    result = evaluation()
    for cells, score in zip(table("task_scores", tmp_path, result), result["tasks"], strict=True):
        difference = score["difference"]
        assert ("(stand-in)" in cells[4]) == score["stand_in"]
        assert float(cells[6]) == pytest.approx(score["mean"], abs=5e-4)
        ends = [difference[key] for key in ("mean", "low", "high")] if difference else None
        assert cells[7] == ("-" if ends is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*ends))


def test_curve_tables_equal_the_json(tmp_path: Path) -> None:
    result = samples.curves()
    overall, *layers = result["curves"]
    for cells, point in zip(table("rate_distortion", tmp_path, result), overall["points"], strict=True):
        rate = point["rate"]
        assert cells[1:3] == [f"{point['bound']:g}", f"{rate['ratio']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"]
        assert cells[4] == ("-" if point["measured_ratio"] is None else f"{point['measured_ratio']:.2f}")
    points = [(curve["group"], point) for curve in layers for point in curve["points"]]
    for cells, (group, point) in zip(table("layer_map", tmp_path, result), points, strict=True):
        assert cells[1:3] == [str(group), f"{point['bound']:g}"]
        assert cells[4] == ("-" if point["measured_ratio"] is None else f"{point['measured_ratio']:.2f}")


def test_calibrations_of_samples_of_unlike_size_are_summed_up_apart(tmp_path: Path) -> None:
    rows = [{**UNFINISHED, "unmet": "no bound"}] * 2
    results = [
        {"format": "jointkv.calibration/1", "settings": {"requests": requests}, "rows": rows} for requests in (40, 96)
    ]
    found = table("predicted_against_measured", tmp_path, *results)
    assert [line[:3] for line in found] == [
        ["names, 40 requests", "kl=0.005", "2"],
        ["names, 96 requests", "kl=0.005", "2"],
    ]


def test_calibration_table_summarises_splits(tmp_path: Path) -> None:
    splits = [(2.0, 2.0, 0.001, True), (2.2, 2.0, 0.004, True), (1.7, 2.0, 0.002, False)]
    rows = [
        {
            "traffic": "near_prefix",
            "target": {"kind": "kl", "value": 0.005},
            "seed": seed,
            "max_relative_error": [0.2],
            "predicted": {"ratio": predicted, "low": 1.5, "high": 2.5, "requests": 32},
            "held_out": {"ratio": measured, "kl": kl, "kl_worst_request": 3 * kl},
            "met": met,
            "seconds": 100.0 + seed,
        }
        for seed, (predicted, measured, kl, met) in enumerate(splits)
    ]
    rows.append(
        {"traffic": "near_prefix", "target": "kl=0.005", "seed": 3, "unmet": "no bound", "met": False, "seconds": 99.0}
    )
    assert table("predicted_against_measured", tmp_path, {"format": "jointkv.calibration/1", "rows": rows}) == [
        [
            "near-prefix",
            "kl=0.005",
            "4",
            "2 of 4 (1 out of reach)",
            "2.00",
            "2.00",
            "-15.0%",
            "0.002",
            "0.004",
            "0.012",
            "100",
        ]
    ]


def test_paper_tables_equal_the_json(tmp_path: Path) -> None:
    result = samples.paper()
    batch = {(row["dataset"], f"{row['threshold']:g}", str(row["batch"])): row for row in result["batch"]}
    found = table("paper_batch", tmp_path, result)
    assert len(found) == len(batch)
    for cells in found:
        row = batch[cells[0], cells[2], cells[4]]
        assert cells[5:7] == [f"{row['ratio']:.2f}", f"{row['ratio_fused_layers']:.2f}"]
        assert cells[9] == ("-" if row["f1"] is None else f"{row['f1']:.3f} ({row['f1_unfused']:.3f})")
    for cells, row in zip(table("paper_chunk", tmp_path, result), result["chunk"], strict=True):
        assert cells[5:7] == [f"{row['ratio_fused_layers']:.2f}", f"{row['kl']:.3g}"]
    for cells, row in zip(table("paper_layers", tmp_path, result), result["layers"], strict=True):
        ends = f"{row['poisson']:.2f} [{row['poisson_low']:.2f}, {row['poisson_high']:.2f}]"
        assert cells[1:5] == [f"{row['threshold']:g}", str(row["layer"]), f"{row['measured']:.2f}", ends]


def test_files_of_one_format_are_joined_and_equal_lines_written_once(tmp_path: Path) -> None:
    one, two = samples.evaluation(("names",)), samples.evaluation(("unrelated",))
    found = table("kl_against_bytes", tmp_path, one, two, one)
    assert [row[0] for row in found] == ["names"] * len(one["rows"]) + ["unrelated"] * len(two["rows"])


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("model", "llama", "model smollm2 and llama"),
        ("traffics", {"names": {"requests": 8}}, "names of other requests"),
    ],
)
def test_results_that_cannot_be_compared_are_not_joined(field: str, value: Any, reason: str, tmp_path: Path) -> None:
    one = samples.evaluation(("names",))
    paths = samples.save(tmp_path, one=one, two={**one, field: value})
    with pytest.raises(BadInput, match=reason):
        make_pictures(paths, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def damaged(path: tuple[Any, ...], value: Any) -> str:
    result: Any = evaluation()
    at = result
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(result)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", '"format" is null'),
        ('{"format": 3}', '"format" is 3'),
        ('{"format": "jointkv.evaluate/2", "rows": []}', '"format" is "jointkv.evaluate/2"'),
        ('{"format": "jointkv.paper/1"}', "nothing in it to show"),
        ('{"format": "jointkv.calibration/1"}', "rows: Field required"),
        (json.dumps({**samples.calibrations(), "rows": [UNFINISHED]}), "rows.0: neither predicted and held_out"),
        (damaged(("rows", 1, "kl"), "small"), "rows.1.kl"),
        (damaged(("rows", 1, "kl"), float("nan")), "rows.1.kl"),
        (damaged(("tasks", 1, "difference"), {"mean": 1.0}), "tasks.1.difference.low"),
        (
            json.dumps({**samples.paper(), "layers": [{"layer": 0, "threshold": 0.7, "measured": 0.0}]}),
            "layers.0.measured",
        ),
    ],
)
def test_damaged_file_changes_nothing(text: str, reason: str, tmp_path: Path) -> None:
    (good,) = samples.save(tmp_path, good=samples.calibrations())
    output = tmp_path / "plots"
    output.mkdir()
    kept = output / "predicted_against_measured.md"
    kept.write_text("as it was")
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    with pytest.raises(BadInput) as raised:
        make_pictures([good, bad], output)
    assert str(bad) in str(raised.value) and reason in str(raised.value)
    assert list(output.iterdir()) == [kept] and kept.read_text() == "as it was"


def test_missing_file_and_unusable_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        make_pictures([tmp_path / "none.json"], tmp_path)
    paths = samples.save(tmp_path, good=samples.curves(layers=0))
    with pytest.raises(BadInput, match="cannot write"):
        make_pictures(paths, paths[0])
