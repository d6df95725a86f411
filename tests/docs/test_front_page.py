"""Every measured number of the front page is that of its result: a new result fails here until the page says it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

import pytest

from jointkv.bench.long_run import LongRun
from jointkv.bench.result import Run, ServingResult
from jointkv.evaluate.compare.result import Demo, Evaluation
from jointkv.report.pictures.task_scores import interval_cell
from jointkv.vllm_plugin.settings import PluginSettings
from tests.docs.doc_pages import ROOT

RESULTS = ROOT / "docs" / "results"
README = " ".join((ROOT / "README.md").read_text().replace("*", "").split())


def serving(name: str) -> ServingResult:
    return ServingResult.load(RESULTS / "serving" / f"{name}.json")


def middle(result: ServingResult, arm: str, number: Callable[[Run], float | None]) -> float:
    found = [number(run) for run in result.of(arm, result.loads[0].label)]
    return median(value for value in found if value is not None)


def test_the_table() -> None:
    result = serving("one_first")
    for title, number, form, unit in (
        ("output tokens per second", lambda run: run.output_tokens_per_s, ".1f", ""),
        ("time to first token, p50", lambda run: run.ttft.p50, ".1f", " s"),
        ("time to first token, p95", lambda run: run.ttft.p95, ".1f", " s"),
        ("prompt tokens computed", lambda run: run.prompt_tokens_computed, ",.0f", ""),
    ):
        cells = [f"{middle(result, arm, number):{form}}{unit}" for arm in ("stock", "licensed")]
        assert f"| {title} | {' | '.join(cells)} |" in README
    equal = {each.arm: f"{each.equal:.0%}" for each in result.fidelity if each.against == "large_pool"}
    tokens = result.of("stock", result.loads[0].label)[0].requests[0].output_tokens
    row = f"to the last of {tokens} tokens | {equal['stock']} | {equal['licensed']} |"
    assert f"| answers equal to those of stock with memory to spare, {row}" in README
    parted = result.divergences or []
    assert parted and all(each.near_tie for each in parted)
    assert (
        f"stock itself held both tokens within {math.ceil(100 * max(each.gap for each in parted)) / 100} nats" in README
    )


def test_the_same_with_all_arms() -> None:
    page = (ROOT / "docs" / "reuse.md").read_text()
    result = serving("one_first")
    speed = {arm.name: middle(result, arm.name, lambda run: run.output_tokens_per_s) for arm in result.arms}
    for arm, title in (
        ("stock", "stock"),
        ("licensed", "reuse, licensed by a profile"),
        ("large_pool", "stock, 8 times the pool"),
        ("licensed_large", "reuse, licensed, 8 times the pool"),
    ):
        every = [run.output_tokens_per_s for run in result.of(arm, result.loads[0].label)]
        p50, p95 = (middle(result, arm, lambda run, at=at: getattr(run.ttft, at)) for at in ("p50", "p95"))
        row = f"| {title} | {speed[arm]:.1f} ({min(every):.1f}-{max(every):.1f}) | {speed[arm] / speed['stock']:.2f} |"
        assert f"{row} {p50:.1f} | {p95:.1f} | " in page


def test_names_under_a_licence() -> None:
    page, result = (ROOT / "docs" / "reuse.md").read_text(), serving("names_near")
    ratios = {(each.upper, each.metric): each.median_ratio for each in result.comparisons if each.lower == "stock"}
    for arm, title in (("stock", "stock"), ("moved", "`moved=true`, copied"), ("in_place", "`moved=true`, in place")):
        runs = result.of(arm, result.loads[0].label)
        speed, p50, p95 = (
            ", ".join(f"{number(run):.1f}" for run in runs)
            for number in (lambda run: run.output_tokens_per_s, lambda run: run.ttft.p50, lambda run: run.ttft.p95)
        )
        faster, sooner = (ratios.get((arm, metric), 1.0) for metric in ("output_tokens_per_s", "ttft_p95"))
        computed = f"{middle(result, arm, lambda run: run.prompt_tokens_computed):,.0f}"
        running = f"{max(run.running_peak for run in runs):.0f}"
        assert f"| {title} | {speed} | {faster:.2f} | {p50} | {p95} | {sooner:.2f} | {computed} | {running} |" in page
    parted = max(each.gap for each in result.divergences or [])
    assert f"where stock held both tokens within\n{parted:.3f} nats" in page


@pytest.mark.parametrize("path", sorted((RESULTS / "peers").glob("*.json")), ids=lambda path: path.stem)
def test_methods_beside_reuse(path: Path) -> None:
    """The table of docs/reuse.md has every method at every level that was measured on each traffic."""
    page = (ROOT / "docs" / "reuse.md").read_text()
    for row in Evaluation.model_validate_json(path.read_text()).rows:
        assert row.work is not None and row.kl is not None and row.diverged is not None
        name = (
            f"{row.traffic.replace('_', ' ')} | {row.method}{'' if row.method == 'full_reuse' else f' {row.level:g}'}"
        )
        shares = f"{row.work.computed_share:.2f} | {row.work.skipped_share:.1%}"
        answers = f"{round(row.diverged * (row.requests or 0))} of {row.requests}"
        start, end = f"| {name} | {shares} | ", f" | {answers} |"
        (line,) = (line for line in page.splitlines() if line.startswith(start) and line.endswith(end))
        kl, worst = map(float, line.removeprefix(start).removesuffix(end).split(" | "))
        assert kl == pytest.approx(row.kl, rel=0.05, abs=6e-6)
        assert worst == pytest.approx(row.kl_worst_request, rel=0.05, abs=6e-6)


def test_questions_on_passages_in_another_order() -> None:
    """The table of docs/reuse.md has every method that was measured."""
    page, measured = ((ROOT / "docs" / name).read_text() for name in ("reuse.md", "measured.md"))
    unfused, *others = Evaluation.model_validate_json((RESULTS / "choices" / "multi_hop.json").read_text()).tasks
    for row in (unfused, *others):
        name = row.method if row.method in ("unfused", "full_reuse") else f"{row.method} {row.level:g}"
        shares = "- | -" if row.work is None else f"{row.work.computed_share:.2f} | {row.work.skipped_share:.1%}"
        scores = f"{row.mean:.3f} | {interval_cell(row.difference, '+.3f')}"
        margins = f"{fmean(row.margins):+.3f} | {interval_cell(row.margin_difference, '+.3f')}"
        orders = interval_cell(row.flipped_orders, ".0%")
        assert f"| {name} | {shares} | {scores} | {margins} | {orders} |" in page
    assert f"{len(unfused.scores)} questions of 2WikiMQA and HotpotQA" in " ".join(page.split())
    right = sum(margin > 0 for margin in unfused.margins)
    assert f"the likeliest for {right} of {len(unfused.scores)}" in " ".join(page.split())
    ours = [row for row in others if row.method in ("fused", "reuse", "reuse_moved")]
    assert len(ours) == 3 and all(row.scores == unfused.scores for row in ours)
    moved = max(abs(a - b) for row in ours for a, b in zip(row.margins, unfused.margins, strict=True))
    assert f"moves by up to {moved:.2f}" in " ".join(page.split())
    assert f"(mean {unfused.mean:.3f}), and margins move by up to {moved:.2f} nats" in " ".join(measured.split())


def test_agents_behind_a_number() -> None:
    result = serving("agent_turns_nonce_many")
    speed = {arm: middle(result, arm, lambda run: run.output_tokens_per_s) for arm in ("stock", "probed")}
    first = {arm: middle(result, arm, lambda run: run.ttft.p50) for arm in ("stock", "probed")}
    assert f"{speed['probed']:.1f} against stock's {speed['stock']:.1f} tokens per second" in README
    assert f"first token after {first['probed']:.1f} against {first['stock']:.1f} s (p50)" in README
    (same,) = (each for each in result.fidelity if (each.arm, each.against) == ("probed", "stock"))
    assert same.equal == 1.0 and f"all {same.pairs} answers equal" in README
    (ratio,) = (each for each in serving("agent_turns_nonce").comparisons if each.metric == "output_tokens_per_s")
    assert f"with 20 tools {ratio.median_ratio:.1f} times stock's tokens per second" in " ".join(README.split())


def test_a_longer_run() -> None:
    found = LongRun.model_validate_json((RESULTS / "serving" / "long_run_reuse.json").read_text())
    last = found.phases[-1]
    assert f"at {last.share:.0%} of the requests that stock can answer" in README
    said = f"first tokens came after {last.ttft('all', 50):.2f} s (p50 of {len(last.samples)} mixed requests;"
    assert said in README
    measured = (ROOT / "docs" / "measured.md").read_text()
    for phase in found.phases:
        times = " | ".join(f"{phase.ttft('first', at):.2f}, {phase.ttft('last', at):.2f}" for at in (50, 95))
        licences = f"{phase.grown('licences_granted'):.0f}, {phase.grown('licences_lost'):.0f}"
        assert f"| {phase.share:.0%} | {times} | {phase.grown('tokens_skipped'):,.0f} | {licences} |" in measured
        assert not phase.failed and not phase.pages_left
    grown = [f"{phase.grown('rss_mib'):,.0f}" for phase in found.phases]
    assert f"Memory grew by {grown[0]} MiB" in measured and f"by {' and '.join(grown[1:])}." in measured


def test_prompts_without_anything_in_common() -> None:
    result = serving("unrelated_reuse")
    (ratio,) = (each for each in result.comparisons if each.metric == "output_tokens_per_s")
    low, high = min(ratio.ratios), max(ratio.ratios)
    assert f"it had {ratio.median_ratio:.2f} of stock's tokens per second ({low:.2f} to {high:.2f})" in README


def test_what_fusion_costs() -> None:
    rows = Demo.model_validate_json((RESULTS / "demo" / "demo.json").read_text()).rows
    (row,) = (each for each in rows if (each.traffic, each.policy) == ("near_prefix", "safe"))
    assert f"mean KL is {row.kl:.5f} on near-prefix traffic, its worst request {row.kl_worst_request:.5f}" in README


def test_the_bounds_are_the_defaults() -> None:
    fields = PluginSettings.model_fields
    block, token = (fields[name].default for name in ("max_relative_error", "max_token_error"))
    assert f"K and V of the block within {block}, of each token within {token}" in README


def test_no_other_number_was_measured() -> None:
    """A measured number, one with a point, that no test above knows of, stands on the front page by itself."""
    tested = (
        r"\| [^|]+ \| [^|]+ \| [^|]+ \|",
        r"Agents that send.*?\)",
        r"with 20 tools [\d.]+ times stock's",
        r"first tokens came after [\d.]+ s",
        r"it had [\d.]+ of stock's.*?\)",
        r"mean KL is [\d.]+ on",
        r"its worst request [\d.]+",
        r"within [\d.]+",
    )
    known = " ".join(found for pattern in tested for found in re.findall(pattern, README))
    versions = set(re.findall(r"(?:Python|vLLM|or|transformers|to) (\d+\.\d+)", README))
    outside = re.sub(r"```.*?```|\([^()]*\)|`[^`]*`|arXiv \S+", " ", README)
    found = {number for number in re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.])", outside)}
    assert found - versions - set(re.findall(r"\d+\.\d+", known)) == set()


@pytest.mark.parametrize("row", json.loads((RESULTS / "bench" / "engine_step.json").read_text())["rows"])
def test_what_one_more_request_costs(row: dict[str, object]) -> None:
    """The table of docs/performance.md has one line for each number of requests that it shows."""
    text = (ROOT / "docs" / "performance.md").read_text()
    line = re.search(rf"^\| {row['running']} \| ([^|]+) \| ([^|]+) \| (\d+)% \| (\d+)% \|", text, re.MULTILINE)
    if line is None:
        return
    per_step, per_token, shares = float(row["seconds_per_step"]), float(row["seconds_per_token"]), row["shares"]
    assert isinstance(shares, dict)
    assert float(line[1]) == pytest.approx(1e3 * per_step, rel=0.006)
    assert float(line[2]) == pytest.approx(1e3 * per_token, abs=0.051)
    assert (line[3], line[4]) == tuple(f"{100 * shares[kind]:.0f}" for kind in ("attention", "matrix products"))


def test_what_accuracy_hides() -> None:
    rows = {row["method"]: row for row in json.loads((RESULTS / "choices" / "choices.json").read_text())["tasks"]}
    text = " ".join((ROOT / "docs" / "measured.md").read_text().split())
    unfused, paper = rows["unfused"], rows["paper"]
    for name in ("fused", "reuse"):
        pairs = zip(rows[name]["margins"], unfused["margins"], strict=True)
        assert max(abs(one - other) for one, other in pairs) < 0.0001 and rows[name]["flipped_orders"]["high"] == 0
        assert f"with {1 - rows[name]['share']:.0%} of the bytes saved" in text
    assert f"on {len(unfused['scores'])} questions" in text and "within 0.0001 nats" in text
    changed = paper["flipped_orders"]
    assert f"in {changed['mean']:.0%} of the questions ({changed['low']:.0%} to {changed['high']:.0%})" in text
    assert f"from {100 * unfused['mean']:.0f} to {paper['mean']:.0%}" in text


def test_every_traffic_in_short() -> None:
    page = (ROOT / "docs" / "measured.md").read_text()
    results = [ServingResult.load(path) for path in sorted((RESULTS / "table").glob("*.json"))]
    for result in results:
        moved = "moved" in [arm.name for arm in result.arms]
        reuse = "moved" if moved else "probed"
        shares = [
            (reuse, lambda run: run.output_tokens_per_s),
            (reuse, lambda run: run.ttft.p95),
            (reuse, lambda run: run.prompt_tokens_computed),
            ("fused", lambda run: run.output_tokens_per_s),
        ]
        assert result.loads[0].kind == "closed"
        cells = [f"{middle(result, arm, number) / middle(result, 'stock', number):.2f}" for arm, number in shares]
        title = result.traffic.replace("_", " ") + ", moved" * moved
        assert f"| {title} | {' | '.join(cells)} |" in page
    assert len(results) == page.split("fusion: tokens/s |")[1].split("\n\n")[0].count("\n| ") - 1


def test_what_scaling_costs() -> None:
    found = json.loads((RESULTS / "bench" / "scaling.json").read_text())
    text = (ROOT / "docs" / "performance.md").read_text()
    for name, growth in found["headline"]["growth"].items():
        part, arm = name.split(", ")
        rows = [row for row in found["rows"] if (row["part"], row["arm"]) == (part, arm)]
        first, last = min(rows, key=lambda row: row["size"]), max(rows, key=lambda row: row["size"])
        unit, digits = ("tokens", 1) if part == "running" else ("requests", 0)
        cells = [f"{each['size']:,} | {1e6 * each['seconds'] / each[unit]:,.{digits}f}" for each in (first, last)]
        assert f"| {arm} | {' | '.join(cells)} | {growth:+.2f} |" in text
    stock, reuse, moved = found["headline"]["bytes_per_resident_block"].values()
    assert f"{stock} bytes per resident block in stock vLLM, {reuse} with reuse, {moved:,} where" in text
