"""Reports become series of `/metrics`: without an engine, in a registry of their own."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

pytest.importorskip("vllm")

from jointkv.vllm_plugin.metrics import JointStats, LicenceGauges
from jointkv.vllm_plugin.prometheus import JointPromMetrics


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> JointPromMetrics:
    kinds: Any = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    engines: dict[int, list[object]] = {0: ["model", "0"], 1: ["model", "1"]}
    return JointPromMetrics(SimpleNamespace(kv_transfer_config=None), kinds, ["model_name", "engine"], engines)


def test_a_second_engine_of_a_process_counts_from_zero() -> None:
    kinds: Any = {kind: kind for kind in (Counter, Gauge, Histogram)}
    for _ in range(2):
        made = JointPromMetrics(SimpleNamespace(kv_transfer_config=None), kinds, ["model_name"], {0: ["model"]})
        assert REGISTRY.get_sample_value("jointkv_pages_freed_total", {"model_name": "model"}) == 0
        made.observe({"counters": {"pages_freed": 3}}, 0)
        assert REGISTRY.get_sample_value("jointkv_pages_freed_total", {"model_name": "model"}) == 3


def licences(state: str = "earning", limit: float = 1.0) -> LicenceGauges:
    return {"allowed": 0.02, "states": {state: 1, "lost": 2}, "classes": {"exact 1": (state, limit)}}


def shown(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"model_name": "model", "engine": "1", **labels})


def test_licences_are_shown_by_state_and_by_class(metrics: JointPromMetrics, registry: CollectorRegistry) -> None:
    metrics.observe({"licences": licences()}, 1)
    metrics.observe({"licences": licences("granted", 0.015)}, 1)
    assert shown(registry, "jointkv_licence_allowed") == 0.02
    assert [shown(registry, "jointkv_licences", state=state) for state in ("earning", "granted", "lost")] == [0, 1, 2]
    assert shown(registry, "jointkv_licence_limit", run_class="exact 1") == 0.015
    assert shown(registry, "jointkv_licence_state", run_class="exact 1", state="granted") == 1
    assert shown(registry, "jointkv_licence_state", run_class="exact 1", state="earning") == 0
    assert shown(registry, "jointkv_licence_limit", run_class="approximate 1") is None


def test_without_reuse_there_are_no_licences(metrics: JointPromMetrics, registry: CollectorRegistry) -> None:
    metrics.observe({"counters": {"prompt_tokens_skipped": 7}, "state": "active"}, 1)
    assert shown(registry, "jointkv_prompt_tokens_skipped_total") == 7
    assert not [series for metric in registry.collect() for series in metric.samples if "licence_" in series.name]


def test_why_an_engine_cannot_reuse(metrics: JointPromMetrics, registry: CollectorRegistry) -> None:
    metrics.observe({"no_reuse": "kv_cache_groups"}, 1)
    assert [shown(registry, "jointkv_no_reuse", reason=reason) for reason in ("kv_cache_groups", "scheduler")] == [1, 0]


def test_the_latest_report_of_licences_counts() -> None:
    total = JointStats({"licences": licences()})
    total.aggregate(JointStats({"counters": {"reuse_audits": 1}}))
    assert total.data["licences"] == licences()
    total.aggregate(JointStats({"licences": licences("lost", 0.04)}))
    assert total.data["licences"] == licences("lost", 0.04)
