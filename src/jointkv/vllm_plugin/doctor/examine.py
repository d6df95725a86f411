"""Runs the same prompts through a stock engine and one with the plugin, and reports on every hook of the plugin.

Run as `python -m jointkv.vllm_plugin.doctor.examine`, with a `Patient` as JSON on stdin: an engine that crashes takes
only this process with it. Every line written to stdout is a JSON object: `{"stage": ...}`, then `{"check": ...}` for
every row of `CHECKS` that came to be known, then `{"statistics": ...}`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointkv.errors import IntegrityError
from jointkv.vllm_plugin.doctor.reuse import REUSE, reused, serve_near_prefix
from jointkv.vllm_plugin.doctor.trial import (
    COPIES,
    EXPECTED_MERGES,
    Overheard,
    Trial,
    build_engine,
    run_trial,
    salted_prompts,
    stop_engine,
    trial_prompts,
    write_tiny_model,
)

CHECKS = (
    "vLLM version",
    "engine starts",
    "worker class",
    "connector",
    "page layout",
    "comparison kernel",
    "workers asked",
    "workers answered",
    "merges committed",
    "remaps applied",
    "tables equal",
    "pages freed",
    "tokens identical",
    "tenants apart",
    "all pages returned",
    "metrics",
    "text reused",
)
FUSION = {"max_relative_error": 0.0, "max_token_error": 0.0, "min_pool_usage": 0.0, "check_integrity": True}

Notify = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Patient:
    """What is examined.

    Attributes:
        folder: a folder for the tiny model.
        model: a folder or hub name to be used instead.
        allow_untested: see `PluginSettings`.
    """

    folder: str
    model: str | None = None
    allow_untested: bool = False


class Rows:
    """Reports checks as they are made."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify

    def add(self, name: str, ok: bool, detail: str) -> None:
        """The check `name` of `CHECKS` is done."""
        assert name in CHECKS
        self._notify({"check": {"name": name, "status": "ok" if ok else "failed", "detail": detail}})

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """An error in the block is a failure of the check `name`, and not the end of the examination."""
        try:
            yield
        except Exception as error:
            self.add(name, False, " ".join(f"{type(error).__name__}: {error}".split()))


def examine(patient: Patient, notify: Notify) -> None:
    """Make all checks. What cannot be made after a failure is left out."""
    rows = Rows(notify)
    with rows.guard("vLLM version"):
        _check_version(rows)
    with rows.guard("engine starts"):
        notify({"stage": "starting a stock engine" + ("" if patient.model else " with a tiny random model")})
        model = patient.model or write_tiny_model(Path(patient.folder))
        stock, stock_near = _run_stock(model, patient.model is None, notify)
        notify({"stage": "starting the engine again, with fusion"})
        engine = build_engine(model, {**FUSION, "allow_untested": patient.allow_untested})
        rows.add("engine starts", True, "twice: stock, and with jointkv at bound 0")
        try:
            _check_engine(rows, engine, stock, notify)
        finally:
            stop_engine(engine)
            del engine
            gc.collect()
        with rows.guard("text reused"):
            _check_reuse(rows, patient, model, stock_near, notify)


def _run_stock(model: str, tiny: bool, notify: Notify) -> tuple[Trial, Trial]:
    """Duplicate prompts, and near-prefix ones."""
    engine = build_engine(model, None)
    try:
        notify({"stage": "serving duplicate prompts unfused"})
        return run_trial(engine, trial_prompts(engine)), serve_near_prefix(engine, tiny)
    finally:
        stop_engine(engine)
        del engine
        gc.collect()


def _check_version(rows: Rows) -> None:
    from jointkv.vllm_plugin.engine.uses import is_tested, vllm_version

    version = vllm_version()
    tested = is_tested(version)
    rows.add("vLLM version", tested, f"{version}, {'tested' if tested else 'never run with jointkv'}")


def _check_engine(rows: Rows, engine: Any, stock: Trial, notify: Notify) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from jointkv.vllm_plugin.connector import JointConnector
    from jointkv.vllm_plugin.worker.mixin import RemappingWorker

    core = engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    rows.add("worker class", isinstance(worker, RemappingWorker), type(worker).__name__)
    connector = core.scheduler.connector
    attached = isinstance(connector, JointConnector) and hasattr(connector, "scheduler")
    rows.add("connector", attached, f"{type(connector).__name__}, {'holds' if attached else 'lacks'} the block tables")
    if not attached:
        return
    scheduler, side = connector.scheduler, get_kv_transfer_group().worker
    with rows.guard("page layout"):
        _check_layout(rows, side)
    with rows.guard("comparison kernel"):
        _check_kernel(rows)

    overheard = Overheard(scheduler, side)
    notify({"stage": "serving the same prompts with fusion"})
    with rows.guard("merges committed"):
        fused = run_trial(engine, trial_prompts(engine))
        _check_talk(rows, overheard, scheduler)
        _check_outcome(rows, stock, fused, scheduler.totals())
        _check_tenants(rows, engine, scheduler)
    with rows.guard("all pages returned"):
        _check_pages(rows, scheduler)
    with rows.guard("metrics"):
        _check_metrics(rows, scheduler.totals())
    notify({"statistics": scheduler.totals()})


def _check_layout(rows: Rows, side: Any) -> None:
    described = [
        f"{pages.num_layers} layers, pages of {pages.block_size} tokens, {str(pages.layers[0].dtype).split('.')[-1]}, "
        + ("tokens in plain order" if bool((pages.token_of.diff() >= 0).all()) else "tokens interleaved")
        for pages in side.comparer.groups.values()
    ]
    rows.add("page layout", bool(described), "; ".join(described))


def _check_kernel(rows: Rows) -> None:
    from jointkv.fusion.kernels import kernels_for

    compiled = kernels_for("cpu") is not None
    rows.add("comparison kernel", True, "compiled" if compiled else "plain torch, slow: no C compiler")


def _check_talk(rows: Rows, overheard: Overheard, scheduler: Any) -> None:
    """What scheduler and workers said to each other."""
    fault = scheduler.recovery.cause
    talk = overheard.counts
    rows.add("workers asked", talk["pairs"] > 0, f"{talk['pairs']} pairs of pages in {talk['inquiries']} steps")
    answered = talk["answered"] == talk["pairs"] > 0
    rows.add("workers answered", answered, f"{talk['answered']} pairs, {talk['equal']} of them equal")
    merged = scheduler.totals()["blocks_merged"]
    said = f"{merged} of {EXPECTED_MERGES} duplicate blocks" + (f"; switched off: {fault}" if fault else "")
    rows.add("merges committed", merged > 0 and fault is None, said)
    rows.add(
        "remaps applied",
        talk["applied"] == talk["remaps"] > 0,
        f"{talk['applied']} of {talk['remaps']} sent are in the worker's tables",
    )
    equal = fault is None and talk["compared"] > 0
    rows.add("tables equal", equal, fault or f"scheduler and worker compared in {talk['compared']} steps")


def _check_outcome(rows: Rows, stock: Trial, fused: Trial, statistics: dict[str, Any]) -> None:
    # At one and the same step, the one where the stock engine holds most, with every request still running.
    step = max(range(len(stock.used)), key=lambda number: stock.used[number])
    freed = stock.used[step] - fused.used[step] if step < len(fused.used) else -1
    rows.add(
        "pages freed",
        freed == fused.freed[step] > 0,
        f"{stock.used[step]} pages in use without fusion, {fused.used[step]} with; {fused.freed[step]} merged by then",
    )
    same = sum(ours == theirs for ours, theirs in zip(fused.outputs, stock.outputs, strict=True))
    rows.add(
        "tokens identical",
        same == len(stock.outputs),
        f"{same} of {len(stock.outputs)} answers, tokens and log-probabilities, equal those of the stock engine",
    )


def _check_tenants(rows: Rows, engine: Any, scheduler: Any) -> None:
    before = scheduler.totals()
    run_trial(engine, salted_prompts(engine))
    after = scheduler.totals()
    merged, considered = (after[name] - before[name] for name in ("blocks_merged", "blocks_considered"))
    rows.add(
        "tenants apart",
        merged == 0 and considered > 0,
        f"{COPIES} equal prompts with different cache_salt: {considered} blocks considered, {merged} merged",
    )


def _check_pages(rows: Rows, scheduler: Any) -> None:
    tables = scheduler.tables
    try:
        scheduler.check_integrity()
    except IntegrityError as error:
        rows.add("all pages returned", False, str(error))
        return
    references = sum(block.ref_cnt for block in tables.pool.blocks if not block.is_null)
    free, pages = tables.pool.get_num_free_blocks(), tables.pool.num_gpu_blocks - 1
    rows.add(
        "all pages returned", references == 0 and free == pages, f"{free} of {pages} free, {references} references"
    )


def _check_metrics(rows: Rows, statistics: dict[str, Any]) -> None:
    from prometheus_client import REGISTRY

    names = {metric.name for metric in REGISTRY.collect() if metric.name.startswith("jointkv_")}
    seen = sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "jointkv_blocks_merged_total"
    )
    rows.add(
        "metrics",
        seen == statistics["blocks_merged"] > 0,
        f"{len(names)} registered with vLLM; jointkv_blocks_merged_total is {seen:.0f}",
    )


def _check_reuse(rows: Rows, patient: Patient, model: str, stock: Trial, notify: Notify) -> None:
    notify({"stage": "starting the engine again, with reuse"})
    engine = build_engine(model, {**REUSE, "allow_untested": patient.allow_untested}, near_prefix=True)
    try:
        notify({"stage": "serving prompts whose text is resident"})
        scheduler = engine.engine_core.engine_core.scheduler.connector.scheduler
        found = reused(scheduler, stock, serve_near_prefix(engine, patient.model is None))
    finally:
        stop_engine(engine)
    # A model of the user's may choose between two words that are all but equally likely.
    as_stock = found.same == found.answers or patient.model is not None
    rows.add("text reused", found.skipped > 0 and found.fault is None and as_stock, str(found))


def main() -> None:
    """Examine the `Patient` on stdin."""
    # vLLM logs to stdout; the rows keep it to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def notify(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    examine(Patient(**json.load(sys.stdin)), notify)


if __name__ == "__main__":
    main()
