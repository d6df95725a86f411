"""What the plugin counts as it appears in vLLM's own `/metrics`."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
from vllm.logger import init_logger
from vllm.v1.metrics.utils import create_metric_per_engine

from jointkv.vllm_plugin.metrics import (
    COUNTERS,
    ERROR_BUCKETS,
    LEFT_ALONE,
    LICENCE_STATES,
    NO_REUSE,
    READERS,
    REASONS,
    STATES,
    STORE_COUNTERS,
    WORKER_COUNTERS,
    LicenceGauges,
)

logger = init_logger(f"vllm.{__name__}")


def _unregister_earlier() -> None:
    """As vLLM does with its own metrics: those of an engine made before in this process give way to the new one's."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("jointkv_"):
            REGISTRY.unregister(collector)


class JointPromMetrics(KVConnectorPromMetrics):
    """Registers the metrics with vLLM and fills them from `JointStats`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        _unregister_earlier()
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._labelnames = labelnames
        self._counters = {
            name: self._per_engine(self._counter_cls(f"jointkv_{name}", text, labelnames=labelnames))
            for name, text in {**COUNTERS, **WORKER_COUNTERS, **STORE_COUNTERS}.items()
        }
        self._rejected = self._by_reason("jointkv_blocks_rejected", "Blocks that keep their own page", REASONS)
        self._left_alone = self._by_reason(
            "jointkv_requests_left_alone", "Requests that shared nothing, untried", LEFT_ALONE
        )
        shared = self._gauge_cls(
            "jointkv_pages_shared",
            "Pages in use by how many block table entries read them.",
            labelnames=[*labelnames, "readers"],
        )
        self._shared = {readers: self._per_engine(shared, readers) for readers in READERS}
        no_reuse = self._gauge_cls(
            "jointkv_no_reuse",
            _by_reason("1 where the engine cannot reuse", NO_REUSE),
            labelnames=[*labelnames, "reason"],
        )
        self._no_reuse = {reason: self._per_engine(no_reuse, reason) for reason in NO_REUSE}
        state = self._gauge_cls(
            "jointkv_state",
            "1 for the present state. inert: nothing was ever considered; recovering: off for a while after an error; "
            "disabled: off for good after internal errors.",
            labelnames=[*labelnames, "state"],
        )
        self._state = {name: self._per_engine(state, name) for name in STATES}
        self._error = self._per_engine(
            self._histogram_cls(
                "jointkv_relative_error",
                "Relative error of merged blocks, the larger one of K and V.",
                labelnames=labelnames,
                buckets=ERROR_BUCKETS,
            )
        )
        self._allowed = self._gauge_cls(
            "jointkv_licence_allowed",
            "Share of a request's reused blocks that may be beyond the bounds, on average over requests.",
            labelnames=labelnames,
        )
        self._licences = self._gauge_cls(
            "jointkv_licences", "Licences to reuse by state, of all classes.", labelnames=[*labelnames, "state"]
        )
        self._licence_state = self._gauge_cls(
            "jointkv_licence_state",
            "1 for the present state of the licence of a class of run, 0 for the others.",
            labelnames=[*labelnames, "run_class", "state"],
        )
        self._licence_limit = self._gauge_cls(
            "jointkv_licence_limit",
            "Upper confidence limit of the share of a request's reused blocks beyond the bounds, mean over audits.",
            labelnames=[*labelnames, "run_class"],
        )
        self._lost = False
        for engine in per_engine_labelvalues:
            self._state["inert"][engine].set(1)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one report. vLLM's API server ends with an error here, so there is none: it is logged, the first one."""
        try:
            self._add(transfer_stats_data, engine_idx)
        except Exception:
            if not self._lost:
                logger.exception("jointkv's metrics are incomplete from now on")
            self._lost = True

    def _add(self, transfer_stats_data: dict[str, Any], engine_idx: int) -> None:
        for name, amount in transfer_stats_data.get("counters", {}).items():
            self._counters[name][engine_idx].inc(amount)
        for reason, amount in transfer_stats_data.get("rejected", {}).items():
            self._rejected[reason][engine_idx].inc(amount)
        for reason, amount in transfer_stats_data.get("left_alone", {}).items():
            self._left_alone[reason][engine_idx].inc(amount)
        for error in transfer_stats_data.get("errors", ()):
            self._error[engine_idx].observe(error)
        for readers, pages in transfer_stats_data.get("shared", {}).items():
            self._shared[readers][engine_idx].set(pages)
        if "state" in transfer_stats_data:
            for name, per_engine in self._state.items():
                per_engine[engine_idx].set(float(name == transfer_stats_data["state"]))
        if "no_reuse" in transfer_stats_data:
            self._no_reuse[transfer_stats_data["no_reuse"]][engine_idx].set(1)
        if "licences" in transfer_stats_data:
            self._show(transfer_stats_data["licences"], self.per_engine_labelvalues[engine_idx])

    def _show(self, licences: LicenceGauges, engine: list[object]) -> None:
        self._allowed.labels(*engine).set(licences["allowed"])
        for state in LICENCE_STATES:
            self._licences.labels(*engine, state).set(licences["states"].get(state, 0))
        for run_class, (present, limit) in licences["classes"].items():
            self._licence_limit.labels(*engine, run_class).set(limit)
            for state in LICENCE_STATES:
                self._licence_state.labels(*engine, run_class, state).set(float(state == present))

    def _by_reason(self, name: str, meaning: str, reasons: dict[str, str]) -> dict[str, dict[int, Any]]:
        counter = self._counter_cls(name, _by_reason(meaning, reasons), labelnames=[*self._labelnames, "reason"])
        return {reason: self._per_engine(counter, reason) for reason in reasons}

    def _per_engine(self, metric: Counter | Gauge | Histogram, *labels: str) -> dict[int, Any]:
        values = {engine: [*values, *labels] for engine, values in self.per_engine_labelvalues.items()}
        return create_metric_per_engine(metric, values)


def _by_reason(meaning: str, reasons: dict[str, str]) -> str:
    return f"{meaning}, by reason: " + "; ".join(f"{reason}: {why}" for reason, why in reasons.items())
