"""A real Prometheus scrapes a real fused server and answers every query of `deploy/`."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from jointkv.system.guard import kill
from jointkv.vllm_plugin.server import Launch

pytest.importorskip("vllm")

DEPLOY = Path(__file__).parents[2] / "deploy"
MODEL = "random"
SHARED = random.Random(0).sample(range(20, 512), 300)
STARTS_WITHIN_S = 180.0
WINDOW = "5m"
REQUESTS = 6
OPTIONS: dict[str, Any] = {
    "min_pool_usage": 0.0,
    "attention": "shared",
    "candidates": "both",
    # A licence that a few audits earn, because there are a few requests.
    "reuse": "licensed",
    "reuse_miss_rate": 0.9,
    "reuse_confidence": 0.5,
    "reuse_audit_rate": 1e-9,
}
SUCCESS = "sum(vllm:request_success_total)"
NEVER_YET = {
    'http_requests_total{job="jointkv", status="5xx"}': "the series appears with the first failing request",
}
"""Selectors of the alerts without a series on a healthy server, and why."""
EMPTY_PANELS: dict[str, str] = {}
"""Expressions of the dashboard that may have no data on a busy server, and why."""

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")


@dataclass
class Prometheus:
    """A running Prometheus, by its HTTP API."""

    url: str

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The series that `expression` gives now. Fails the test when it is not valid."""
        answer = self._get("query", query=expression)
        assert answer["resultType"] == "vector", expression
        return list(answer["result"])

    def alerts(self) -> dict[str, dict[str, Any]]:
        """The alerts it has loaded, by name, with state and health of each rule."""
        groups = self._get("rules", type="alert")["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{parameters}: {error.read().decode()}")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with the configuration of `deploy/`, on a server that has merged some blocks of a random model."""
    folder = tmp_path_factory.mktemp("dashboard")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEPLOY.parent / "benchmarks"))
        from soak import write_model
    model = write_model(folder / "model")
    with ExitStack() as running:
        port = free_port()
        server = f"http://127.0.0.1:{port}"
        running.enter_context(ended_process(serve_command(model, port), folder / "server.log", f"{server}/health"))
        address = f"127.0.0.1:{free_port()}"
        command = ["prometheus", f"--config.file={configuration(folder, port)}"]
        command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
        running.enter_context(ended_process(command, folder / "prometheus.log", f"http://{address}/-/ready"))
        found = Prometheus(f"http://{address}")
        wait_for(lambda: found.ask("jointkv_state"), 100, "no first scrape")  # a rate needs a sample before the load
        for answered in (REQUESTS, 2 * REQUESTS):  # some series appear with the first request
            load(server, answered)
            wait_for(lambda wanted=answered: value_of(found, SUCCESS) == wanted, 100, "no scrape after the load")
        yield found


def serve_command(model: str, port: int) -> list[str]:
    launch = Launch(OPTIONS, "cpu").to_json()
    command = [sys.executable, "-P", "-m", "jointkv.vllm_plugin.server", launch, model, "--served-model-name", MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--block-size", "32"]
    return [*command, "--num-gpu-blocks-override", "200", "--max-model-len", "512", "--enforce-eager"]


def configuration(folder: Path, port: int) -> Path:
    """`deploy/prometheus.yml` with this server, its rules where they are, and a scrape every second."""
    content = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    content["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    content["rule_files"] = [str(DEPLOY / name) for name in content["rule_files"]]
    (job,) = content["scrape_configs"]
    (targets,) = job["static_configs"]
    assert targets["targets"] == ["localhost:8000"]
    targets["targets"] = [f"127.0.0.1:{port}"]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def ended_process(command: list[str], log: Path, ready: str) -> Iterator[None]:
    """Run `command` in a session of its own until `ready` answers; every process of it ends with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(
            lambda: process.poll() is not None or answers(ready), STARTS_WITHIN_S, f"{ready} does not answer, see {log}"
        )
        assert process.poll() is None, log.read_text()[-4000:]
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        kill(process.pid)
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def wait_for(condition: Any, seconds: float, message: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.3)


def load(server: str, first: int) -> None:
    """Near-prefix requests at once: their first tokens differ, from number `first` on, the rest is the same."""

    def ask(number: int) -> None:
        body = {"model": MODEL, "prompt": [number, *SHARED], "max_tokens": 48, "temperature": 0}
        data = json.dumps({**body, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"{server}/v1/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=100) as answer:
            assert json.load(answer)["choices"]

    with ThreadPoolExecutor(REQUESTS) as threads:
        list(threads.map(ask, range(first, first + REQUESTS)))


def value_of(prometheus: Prometheus, expression: str) -> float:
    """The one number that `expression` gives, NaN if none."""
    series = prometheus.ask(expression)
    return float(series[0]["value"][1]) if series else math.nan


def dashboard_expressions() -> list[str]:
    """What Grafana would ask, with its variables filled in."""
    dashboard = json.loads((DEPLOY / "grafana" / "jointkv.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for name, value in {"$instance": ".*", "$__rate_interval": WINDOW, "$__range": WINDOW}.items():
        asked = [expression.replace(name, value) for expression in asked]
    return asked


def documented_queries() -> list[str]:
    """The queries in docs/metrics.md."""
    text = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    return [" ".join(query.split()) for query in re.findall(r"```promql\n(.*?)```", text, re.S)]


def alert_rules() -> Mapping[str, str]:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def selectors(expression: str) -> list[str]:
    """`name{labels}` of every series that an expression reads."""
    return re.findall(r"\b(?:(?:jointkv_|vllm:|http_)[\w:]+|up)\b(?:\{[^}]*\})?", expression)


def test_the_server_merged_blocks(prometheus: Prometheus) -> None:
    merged = value_of(prometheus, "jointkv_blocks_merged_total")
    assert merged > 0 and value_of(prometheus, "jointkv_pages_freed_total") == merged
    assert value_of(prometheus, 'jointkv_state{state="active"}') == 1


def test_the_server_skipped_prompt_tokens(prometheus: Prometheus) -> None:
    assert (
        0
        < value_of(prometheus, "jointkv_prompt_tokens_skipped_total")
        < value_of(prometheus, "vllm:prompt_tokens_total")
    )
    assert value_of(prometheus, "jointkv_licence_allowed") == OPTIONS["reuse_miss_rate"]
    assert value_of(prometheus, 'jointkv_licence_state{run_class="exact 1", state="granted"}') == 1
    assert 0 < value_of(prometheus, 'jointkv_licence_limit{run_class="exact 1"}') <= OPTIONS["reuse_miss_rate"]


@pytest.mark.parametrize("expression", [*dashboard_expressions(), *documented_queries()])
def test_every_query_has_data(prometheus: Prometheus, expression: str) -> None:
    values = [float(series["value"][1]) for series in prometheus.ask(expression)]
    if expression in EMPTY_PANELS:
        return
    assert values and not any(math.isnan(value) for value in values)


def test_the_dashboard_shows_what_happened(prometheus: Prometheus) -> None:
    """A wrong label in a query would still give a zero."""
    zero_on_a_healthy_server = (
        "faults",
        "preemptions",
        "waiting",
        "running",
        "bounds",
        "rejected",
        "isolation",
        "missed",
        "licence",
        "left_alone",
        "no_reuse",
        "by_signature",
        "direction",
        "moved",
        "pages_filled",
        "blocks_in_place",
        "store",
    )
    for expression in dashboard_expressions():
        if not any(name in expression for name in (*zero_on_a_healthy_server, "kv_cache_usage_perc")):
            values = [float(series["value"][1]) for series in prometheus.ask(expression)]
            assert max(values) > 0, expression


def test_the_servers_to_choose_from(prometheus: Prometheus) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "jointkv.json").read_text())
    (variable,) = [one for one in dashboard["templating"]["list"] if one["type"] == "query"]
    found = re.fullmatch(r"label_values\((?P<name>.*), (?P<label>\w+)\)", variable["query"]["query"])
    assert found is not None
    series = prometheus.ask(found["name"])
    assert series and all(found["label"] in one["metric"] for one in series)


@pytest.mark.parametrize(("alert", "expression"), alert_rules().items())
def test_every_alert_reads_series_that_exist(prometheus: Prometheus, alert: str, expression: str) -> None:
    read = selectors(expression)
    assert read
    for selector in read:
        assert prometheus.ask(selector) or selector in NEVER_YET, selector


@pytest.mark.parametrize(("alert", "expression"), alert_rules().items())
def test_no_alert_on_a_healthy_server(prometheus: Prometheus, alert: str, expression: str) -> None:
    assert prometheus.ask(expression) == []
    rule = prometheus.alerts()[alert]
    assert (rule["health"], rule["state"]) == ("ok", "inactive"), rule


def test_series_that_are_said_to_be_missing_are_missing(prometheus: Prometheus) -> None:
    read = {selector for expression in alert_rules().values() for selector in selectors(expression)}
    for selector, reason in NEVER_YET.items():
        assert selector in read and reason and prometheus.ask(selector) == []
        assert prometheus.ask(selector.replace("5xx", "2xx")), "the same series of requests that do not fail"
