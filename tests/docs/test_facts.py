"""Tables of options and metrics, and the list of results, against the code and the files."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from jointkv.bench.result import ServingResult
from jointkv.evaluate.methods import method_names
from jointkv.theory.adapt import BoundController
from jointkv.vllm_plugin.settings import PluginSettings
from tests.docs.doc_pages import ROOT, blocks

DOCS = ROOT / "docs"
METRICS = ROOT / "src" / "jointkv" / "vllm_plugin" / "metrics.py"


def constants() -> dict[str, object]:
    """The literals of the metrics module; importing it needs vLLM."""
    found = {}
    for node in ast.parse(METRICS.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def section(page: str, heading: str) -> str:
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


def first_column(text: str) -> list[str]:
    """The code in the first cell of every row."""
    return [
        code for row in re.findall(r"^\| ([^|]*`[^|]*)\|", text, re.MULTILINE) for code in re.findall("`(.*?)`", row)
    ]


def test_options_and_their_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", section("operating.md", "Options"), re.MULTILINE)
    said = {name: None if default == "none" else yaml.safe_load(default) for name, default in rows}
    assert said == {name: field.default for name, field in PluginSettings.model_fields.items()}


def test_every_metric_is_explained() -> None:
    literals = constants()
    named_constants = ("COUNTERS", "WORKER_COUNTERS", "REASONS", "LEFT_ALONE", "NO_REUSE", "STATES", "LICENCE_STATES")
    counters, workers, reasons, left_alone, no_reuse, states, licences = (literals[name] for name in named_constants)
    stored = literals["STORE_COUNTERS"]
    assert isinstance(stored, dict)
    assert isinstance(left_alone, dict) and isinstance(no_reuse, dict)
    assert isinstance(counters, dict) and isinstance(workers, dict)
    assert isinstance(reasons, dict) and isinstance(states, tuple) and isinstance(licences, tuple)
    page = (DOCS / "metrics.md").read_text()
    named = {code.partition("{")[0] for code in first_column(page)}
    expected = {f"jointkv_{name}_total" for name in (*counters, *workers, *stored)} | {
        "jointkv_blocks_rejected_total",
        "jointkv_requests_left_alone_total",
    }
    expected |= {"jointkv_pages_shared", "jointkv_relative_error", "jointkv_state", "jointkv_no_reuse"}
    expected |= {"jointkv_licences", "jointkv_licence_state", "jointkv_licence_limit", "jointkv_licence_allowed"}
    assert {name for name in named if name.startswith("jointkv_")} == expected
    assert expected >= set(re.findall(r'"(jointkv_\w+[a-z])"', METRICS.with_name("prometheus.py").read_text())) - {
        "jointkv_blocks_rejected",
        "jointkv_requests_left_alone",
    }
    assert set(reasons) | set(left_alone) | set(no_reuse) | set(states) | set(licences) <= named
    for name, text in reasons.items():
        assert f"| `{name}` | {text} |" in page


def test_labels_and_buckets() -> None:
    literals, page = constants(), (DOCS / "metrics.md").read_text()
    readers, buckets = literals["READERS"], literals["ERROR_BUCKETS"]
    assert isinstance(readers, tuple) and isinstance(buckets, tuple)
    assert ", ".join(f"`{label}`" for label in readers) in page
    assert "buckets " + ", ".join(f"{edge:g}" for edge in buckets) + " |" in page


def test_every_alert_has_an_answer() -> None:
    groups = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"]]
    assert {name for name in first_column(section("operating.md", "Alerts")) if name.startswith("Jointkv")} == set(
        alerts
    )


def test_how_bounds_adapt() -> None:
    text = section("choosing-a-bound.md", "Adaptation")
    defaults = BoundController(distortion=0.0, acceptance=0.0)
    for number in (f"{defaults.window} blocks", f"above {defaults.band} times", f"a step of {defaults.step}"):
        assert number in text
    assert defaults.patience == 2 and "two windows in a row" in " ".join(text.split())


@pytest.mark.parametrize("result", sorted((DOCS / "results").rglob("*.json")), ids=lambda path: path.name)
def test_every_result_has_its_command(result: Path) -> None:
    """A link to the file, or to all files of its folder as `docs/results/FOLDER/*.json`."""
    text = (DOCS / "reproducing.md").read_text()
    assert f"({result.relative_to(DOCS)})" in text or f"`{result.parent.relative_to(ROOT)}/*.json`" in text


def test_numbers_that_the_pages_quote() -> None:
    profile = json.loads((DOCS / "results/calibration/profile_near_prefix.json").read_text())
    predicted, held_out = profile["predicted"], profile["held_out"]
    text = " ".join((DOCS / "choosing-a-bound.md").read_text().split())
    assert f"ratio of {predicted['ratio']:.2f} ({predicted['low']:.2f} to {predicted['high']:.2f})" in text
    assert f"measured {held_out['ratio']:.2f} on the held-out half, at KL {held_out['kl']:.5f}" in text
    serving = ServingResult.load(DOCS / "results/serving/near_prefix.json")
    ratio = {each.metric: each.median_ratio for each in serving.comparisons}
    text = " ".join((DOCS / "index.md").read_text().split())
    assert f"{ratio['running_peak']:.1f} times as many requests at once gave" in text
    assert f"gave {ratio['output_tokens_per_s']:.2f} times the tokens per second" in text


def test_what_is_said_beside_the_advice_to_cut_prompts_into_chunks() -> None:
    """Two faults of vLLM lie on this way."""
    advice = [
        paragraph
        for page in (*DOCS.glob("*.md"), ROOT / "README.md")
        for paragraph in re.split(r"\n(?=- |\n)", page.read_text())
        if "small `--max-num-batched-tokens`" in paragraph
    ]
    assert advice and all("`seed`" in each and "`EngineCore`" in each and "`/health`" in each for each in advice)


def test_how_many_methods_there_are() -> None:
    assert f"{len(method_names())} methods on one interface" in " ".join((DOCS / "index.md").read_text().split())


def test_how_many_methods_have_as_many_bytes_as_fusion() -> None:
    lines = (DOCS / "results/evaluate/kl_against_bytes.md").read_text().splitlines()
    methods = {cells[2].strip() for cells in (line.split("|") for line in lines) if len(cells) > 5} - {"method", "---"}
    assert {"fused", "snapkv"} <= methods and len(methods - {"fused"}) == 13
    assert "thirteen other methods at equal bytes" in " ".join((ROOT / "README.md").read_text().split())


def test_what_stored_pages_cost() -> None:
    text = " ".join((DOCS / "store.md").read_text().split())
    alone, streams, speed, fetching = (
        json.loads((DOCS / f"results/{name}.json").read_text())
        for name in ("codec/codec_unrelated", "codec/codec_streams", "bench/codec_speed", "bench/store_fetching")
    )
    for row in alone["rows"]:
        assert f"| {row['ratio']:.2f} | {row['kl']:.{6 if row['kl'] < 1e-4 else 4}f} |" in text
    for row in streams["rows"]:
        name = row["traffic"].replace("near_prefix", "near-prefix").replace("_", " ")
        assert f"| {name} | {row['setting']} | {row['ratio']:.1f} | {row['kl']:.4f} |" in text
    assert f"At KL 0.001 that is {alone['headline']['ratio_at_kl']:.2f} times" in text
    near, agents = (streams["headline"][f"{name}_ratio"] for name in ("near_prefix", "agent_turns"))
    assert f"Within KL 0.001 that is {near:.1f} and {agents:.1f} times" in text
    rates, headline = speed["megabytes_per_s_and_core"], speed["headline"]
    for name in ("alone", "lossless"):
        assert re.search(rf"{rates[name]['encode']:.0f}( MB/s to encode)? and {rates[name]['decode']:.0f}", text)
    for name in ("encode_within_a_bound", "matrix_products_alone"):
        assert f"{headline[name]:.0f} MB/s" in text
    (prompt,) = fetching["prompts"]
    assert f"computed in {prompt['computed_s']:.1f} s" in text
    assert f"from {prompt['break_even_mbit_per_s']:.0f} Mbit/s on" in text


def test_queries_name_metrics_that_are_explained() -> None:
    page = DOCS / "metrics.md"
    named = {code.partition("{")[0] for code in first_column(page.read_text())}
    queries = [block.text for block in blocks(page) if block.language == "promql"]
    used = {
        re.sub(r"_(bucket|count|sum)$", "", name) for query in queries for name in re.findall(r"jointkv_\w+", query)
    }
    assert queries and used <= named


def test_numbers_that_the_licence_is_said_to_have() -> None:
    found = json.loads((DOCS / "results/reuse/licence.json").read_text())
    headline, text = found["headline"], " ".join(section("how-it-works.md", "The licence to reuse").split())
    first, over = headline["audits_without_a_miss"], headline["over_the_least"]
    assert f"{first} audits earn a licence at 2%, {over:.2f} times" in text
    late, foreign = headline["change_found_after_median"], headline["foreign_lost_after_median"]
    assert f"after 5 to {late:.0f} audits" in text and f"lost after 5 to {foreign:.0f} " in text
    assert f"{headline['change_not_found_in_100']:.0%} of licences outlive 100" in text
    assert f"({headline['foreign_not_lost_in_100']:.1%} outlive 100)" in text
    assert f"{headline['wrongly_granted_at_the_rate_streaks']:.0%} of the licences are granted" in text
    assert f"{headline['lost_to_a_false_alarm_at_a_quarter']:.0%} to a false alarm" in text
