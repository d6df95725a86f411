"""What can be checked of `deploy/` without a server; the real Prometheus is in tests/vllm_plugin/test_dashboard.py."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
METRICS = ROOT / "src" / "jointkv" / "vllm_plugin" / "metrics.py"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's package prometheus")


def exported() -> set[str]:
    """Names in `/metrics`, read from the source: importing it needs vLLM."""
    tree, shown = (ast.parse(file.read_text()) for file in (METRICS, METRICS.with_name("prometheus.py")))
    literals = [
        node.value for node in ast.walk(shown) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    direct = {name for name in literals if re.fullmatch(r"jointkv_\w+[a-z]", name)}
    counters = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("COUNTERS", "WORKER_COUNTERS", "STORE_COUNTERS")
    ]
    keys = [key for literal in counters if isinstance(literal, ast.Dict) for key in literal.keys if key is not None]
    totals = {f"jointkv_{ast.literal_eval(key)}_total" for key in keys}
    assert len(counters) == 3
    histogram = {f"jointkv_relative_error_{part}" for part in ("bucket", "count", "sum")}
    by_reason = {"jointkv_blocks_rejected", "jointkv_requests_left_alone"}
    return (
        totals | {f"{name}_total" for name in by_reason} | histogram | direct - by_reason - {"jointkv_relative_error"}
    )


def dashboard() -> dict[str, Any]:
    return dict(json.loads((DEPLOY / "grafana" / "jointkv.json").read_text()))


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=DEPLOY, capture_output=True, text=True, timeout=60)


@needs_promtool
@pytest.mark.parametrize(
    "check", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"]
)
def test_promtool_accepts(check: str) -> None:
    result = promtool(*check.split())
    assert result.returncode == 0, result.stdout + result.stderr


@needs_promtool
def test_every_alert_has_a_test_that_raises_it() -> None:
    tests = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    raised = {case["alertname"] for case in cases if case.get("exp_alerts")}
    quiet = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert raised == quiet == {rule["alert"] for rule in alerts()}


def test_alerts_say_what_they_mean() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_only_metrics_that_exist() -> None:
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    expressions += [rule["expr"] for rule in alerts()]
    used = {name for expression in expressions for name in re.findall(r"\bjointkv_\w+", expression)}
    assert used and used <= exported(), used - exported()


def test_every_metric_of_the_plugin_is_on_the_dashboard() -> None:
    shown = {
        name for panel in dashboard()["panels"] for target in panel["targets"]
        for name in re.findall(r"\bjointkv_\w+", target["expr"])
    }  # fmt: skip
    assert exported() - shown == {"jointkv_relative_error_count", "jointkv_relative_error_sum"}


def test_the_dashboard_can_be_imported_anywhere() -> None:
    """No data source, id or variable of the machine where it was made."""
    board = dashboard()
    variables = {variable["name"] for variable in board["templating"]["list"]}
    built_in = {"__rate_interval", "__range"}
    assert board["id"] is None and variables == {"datasource", "instance"}
    sources = re.findall(r'"uid": "([^"]*)"', json.dumps({"panels": board["panels"], "list": board["templating"]}))
    assert set(sources) == {"${datasource}"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"])))
    assert used <= variables | built_in


def test_panels_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        taken = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        cells |= taken
