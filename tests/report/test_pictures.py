"""Pictures and tables from JSON results: those of the committed ones, what is drawn, joined and refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jointkv.errors import BadInput
from jointkv.report.pictures import FORMATS, PICTURES, make_pictures
from jointkv.report.results import read_result
from tests.report import samples
from tests.report.samples import RESULTS, Result, save

PICTURE = {picture.name: picture for picture in PICTURES}
COMMITTED = sorted(
    path
    for path in RESULTS.rglob("*.json")
    if json.loads(path.read_text()).get("format") in {kind.model_fields["format"].default for kind in FORMATS}
)


def read(folder: Path, *results: Result) -> list[Any]:
    paths = save(folder, **{f"r{place}": result for place, result in enumerate(results)})
    return [read_result(path, FORMATS) for path in paths]


def table(name: str, folder: Path, *results: Result) -> list[list[str]]:
    """The cells of the table of the picture `name`, without heading and rule."""
    lines = [line for line in PICTURE[name].table(read(folder, *results)).splitlines() if line.startswith("| ")]
    assert lines[1].startswith("| ---") and len({line.count(" | ") for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def draw(name: str, folder: Path, *results: Result) -> Any:
    figure = PICTURE[name].draw(read(folder, *results))
    assert figure is not None
    return figure


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_committed_result_is_drawn(path: Path, tmp_path: Path) -> None:
    written = make_pictures([path], tmp_path / "new" / "plots")
    assert sorted(written) == sorted((tmp_path / "new" / "plots").iterdir())
    assert {file.stem for file in written if file.suffix == ".png"} <= {file.stem for file in written}
    for file in written:
        if file.suffix == ".png":
            assert file.read_bytes().startswith(b"\x89PNG\r\n") and file.stat().st_size > 10_000


FOLDERS = [
    *("evaluate", "choices", "calibration", "paper", "side_channel", "reuse", "frontier", "peers", "codec"),
    *("table", "profile"),
]
ONLY = {"peers": "kl_against_computed", "profile": "kl_against_computed", "table": "serving_table"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_committed_tables_are_those_of_the_committed_results(folder: str) -> None:
    results = [read_result(path, FORMATS) for path in COMMITTED if path.parent.name == folder]
    for picture in [PICTURE[ONLY[folder]]] if folder in ONLY else PICTURES:
        chosen = [result for result in results if isinstance(result, picture.reads) and picture.rows([result])]
        if chosen:
            assert picture.table(chosen) == (RESULTS / folder / f"{picture.name}.md").read_text(encoding="utf-8")


def test_one_picture_alone(tmp_path: Path) -> None:
    path = RESULTS / "serving" / "one_first.json"
    assert make_pictures([path], tmp_path, ["serving_arms"]) == [
        tmp_path / "serving_arms.png",
        tmp_path / "serving_arms.md",
    ]
    with pytest.raises(BadInput, match="unknown picture 'arms'; known: kl_against_bytes, "):
        make_pictures([path], tmp_path, ["arms"])


def test_formats_and_names_of_pictures_are_unique() -> None:
    assert len(PICTURE) == len(PICTURES)
    assert len({kind.model_fields["format"].default for kind in FORMATS}) == len(FORMATS)


def test_savings_are_those_at_16_bits(tmp_path: Path) -> None:
    result = samples.evaluation()
    row = {**result["rows"][0], "share": 0.1, "share_16bit": 0.75, "kl": 0.0}
    result["rows"] = [row]
    assert table("kl_against_bytes", tmp_path, result)[0][6] == "25.0%"
    drawn = draw("kl_against_bytes", tmp_path, result).axes[0].lines[0]
    assert drawn.get_xydata().tolist() == [[0.25, 0.0]]


def test_methods_that_share_across_requests_are_solid_and_the_others_dashed(tmp_path: Path) -> None:
    result = samples.evaluation()
    styles = {
        line.get_label(): line.get_linestyle() for line in draw("kl_against_bytes", tmp_path, result).axes[0].lines
    }
    for row in result["rows"]:
        assert styles[row["method"]] == ("-" if row["shares_across_requests"] else "--")


def test_names_with_dollar_signs_are_no_formulas(tmp_path: Path) -> None:
    text = json.dumps(samples.evaluation()).replace("near_prefix", "$x_{").replace("gsm8k", "$y^{")
    assert make_pictures(save(tmp_path, result=json.loads(text)), tmp_path / "plots")


def test_what_was_not_measured_is_a_dash_and_leaves_only_the_table(tmp_path: Path) -> None:
    result = samples.evaluation(rows=1)
    unmeasured = dict.fromkeys(
        ("share_16bit", "kl", "kl_worst_request", "top1", "nll", "nll_reference", "common_prefix")
    )
    result["rows"] = [{**result["rows"][0], **unmeasured, "not_run": "TypeError: a | and\na second line"}]
    result["tasks"] = [score for score in result["tasks"] if score["difference"] is None]
    (cells,) = table("kl_against_bytes", tmp_path, result)
    assert cells[5] == "not run: TypeError: a \\| and a second line" and set(cells[6:]) == {"-"}
    assert {task[-1] for task in table("task_scores", tmp_path, result)} == {"-"}
    written = make_pictures(save(tmp_path, result=result), tmp_path / "plots")
    assert sorted(path.name for path in written) == ["kl_against_bytes.md", "task_scores.md"]


def test_scores_stand_beside_what_was_computed_where_that_is_known(tmp_path: Path) -> None:
    result = samples.evaluation()
    assert {len(cells) for cells in table("task_scores", tmp_path, result)} == {8}
    work = {"tokens": 100, "exact_tokens": 0, "skipped_tokens": 40, "flops": 3, "flops_unfused": 4}
    result["tasks"][1]["work"] = {**work, "reused_blocks": 0, "missed_blocks": 0}
    cells = table("task_scores", tmp_path, result)
    assert cells[0][8:] == ["-", "-"] and cells[1][8:] == ["75.0%", "40.0%"]


def test_calibrations_out_of_reach_are_counted_and_samples_of_unlike_size_kept_apart(tmp_path: Path) -> None:
    one, two = samples.calibrations(), samples.calibrations()
    out = {"traffic": "names", "target": "kl=0.0001", "seed": 9, "unmet": "no bound", "met": False}
    one["rows"], two["rows"] = [*one["rows"], out], [out]
    two["settings"]["requests"] = 96
    found = table("predicted_against_measured", tmp_path, one, two)
    assert [line[:4] for line in found] == [
        ["names, 40 requests", "kl=0.0001", "11", "10 of 11 (1 out of reach)"],
        ["names, 96 requests", "kl=0.0001", "1", "0 of 1 (1 out of reach)"],
    ]
    assert set(found[1][4:]) == {"-"}


def test_a_broken_bound_on_influence_is_named(tmp_path: Path) -> None:
    broken = samples.influence()
    row = next(row for row in broken["rows"] if row.get("rows"))
    row["rows"]["kl"]["holds"] = False
    assert str(table("influence", tmp_path, broken)).count("(broken)") == 1


def test_influence_without_a_search_is_drawn(tmp_path: Path) -> None:
    result = samples.influence()
    result["rows"] = [row for row in result["rows"] if not row.get("rows")]
    assert [text.get_text() for text in draw("influence", tmp_path, result).axes[2].texts] == ["not measured"]


def test_what_was_told_apart_stands_out(tmp_path: Path) -> None:
    result = samples.side_channel()
    cells = [cell for line in table("side_channel", tmp_path, result) for cell in line[5:]]
    assert sum(cell.startswith("**") for cell in cells) == sum(row["found"] and row["varies"] for row in result["rows"])
    assert cells.count("-") == len(cells) - sum(row["varies"] for row in result["rows"])


def test_files_of_one_format_are_joined_and_equal_lines_written_once(tmp_path: Path) -> None:
    one, two = samples.evaluation("names"), samples.evaluation("unrelated")
    found = table("kl_against_bytes", tmp_path, one, two, one)
    assert [row[0] for row in found] == ["names"] * len(one["rows"]) + ["unrelated"] * len(two["rows"])


@pytest.mark.parametrize(
    ("make", "field", "value", "reason"),
    [
        (samples.evaluation, "model", "llama", "model smollm2 and llama"),
        (samples.evaluation, "traffics", {"near_prefix": {"requests": 8}}, "requests of traffic near_prefix"),
        (samples.influence, "model", "llama", "model smollm2 and llama"),
    ],
)
def test_results_that_cannot_be_compared_are_not_joined(
    make: Callable[[], Result], field: str, value: Any, reason: str, tmp_path: Path
) -> None:
    paths = save(tmp_path, one=make(), two={**make(), field: value})
    with pytest.raises(BadInput, match=reason):
        make_pictures(paths, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def damaged(result: Result, path: Sequence[Any], value: Any) -> str:
    at: Any = result
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
        (json.dumps(samples.paper(rows=0)), "nothing in it to show"),
        ('{"format": "jointkv.side_channel/1"}', "model: Field required"),
        (damaged(samples.evaluation(), ("rows", 1, "kl"), "small"), "rows.1.kl"),
        (damaged(samples.evaluation(), ("rows", 1, "kl"), float("nan")), "NaN is no number"),
        (damaged(samples.evaluation(), ("tasks", 1, "difference"), {"mean": 1.0}), "tasks.1.difference.low"),
        (damaged(samples.paper(), ("layers", 0, "measured"), 0.0), "layers.0.measured"),
    ],
)
def test_damaged_file_changes_nothing(text: str, reason: str, tmp_path: Path) -> None:
    (good,) = save(tmp_path, good=samples.calibrations())
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
    paths = save(tmp_path, good=samples.curves(layers=0))
    with pytest.raises(BadInput, match="cannot write"):
        make_pictures(paths, paths[0])


def test_published_codecs_stand_beside_with_their_sources(tmp_path: Path) -> None:
    result = samples.codecs()
    drawn = draw("codec_rates", tmp_path, result).axes
    traffics = list(dict.fromkeys(row["traffic"] for row in result["rows"]))
    assert [axes.get_title() for axes in drawn[:-1]] == [name.replace("_", "-") for name in traffics]
    assert [line.get_ydata().tolist() for line in drawn[-1].lines] == [
        [peer["low"], peer["high"]] for peer in result["published"]
    ]
    text = PICTURE["codec_rates"].table(read(tmp_path, result))
    assert all(f"| {peer['source']} |" in text for peer in result["published"])
    alone = draw("codec_rates", tmp_path, {**result, "published": []}).axes
    assert len(alone) == len(traffics)
