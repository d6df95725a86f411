"""Engines and options of the plugin that the scheduler's machine runs with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from jointkv.vllm_plugin import engine_args
from tests.vllm_plugin.scheduler.fake_files import FILES
from tests.vllm_plugin.scheduler.fake_pages import ALIKE

BLOCK = 4
PAGES = 30
"""For every layer group, unless a variant says otherwise; a request of `LONGEST` tokens needs 16."""

LONGEST = 64
CHUNK = 16
IN_CHUNKS = {"chunk_tokens": CHUNK}

WRITTEN = {"directions": "written", "own_norms": True, "max_relative_error": 0.24, "max_token_error": 0.35, **ALIKE}
ROOM = {"pages": 60, "tokens": 48}
"""For blocks to become full together, and for pages that are held beside those of running requests."""

IN_PLACE = {"moved": True, "attention": "shared"}
EARNED_SOON = {"reuse": "licensed", "reuse_miss_rate": 0.9, "reuse_confidence": 0.3, "reuse_audit_rate": 0.2}

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one table": ({}, {}),
    "two groups": ({"layer_groups": 2}, {}),
    "chunks": ({"scope": "chunk", **IN_CHUNKS}, {}),
    "two groups, chunks, strict": ({"layer_groups": 2, "scope": "both", "isolation": "strict", **IN_CHUNKS}, {}),
    "asynchronous": ({"scope": "both", **IN_CHUNKS}, {"async_scheduling": True}),
    "asynchronous, two groups": ({"layer_groups": 2, "max_candidates": 1}, {"async_scheduling": True, "apart": True}),
    "three stages": ({"scope": "both", **IN_CHUNKS}, {"pipeline_parallel_size": 3}),
    "second runner": ({"scope": "both", **IN_CHUNKS}, {"second_runner": True}),
    "second runner, asynchronous, two groups": (
        {"layer_groups": 2},
        {"second_runner": True, "async_scheduling": True, "apart": True},
    ),
    "beside files": ({"scope": "both", **IN_CHUNKS}, {"beside": [FILES]}),
    "beside files, second runner, asynchronous, two groups": (
        {"layer_groups": 2},
        {"beside": [FILES], "second_runner": True, "async_scheduling": True, "apart": True},
    ),
    "signatures": ({"candidates": "signature"}, {}),
    "signatures, asynchronous, two groups, chunks": (
        {"candidates": "both", "layer_groups": 2, "scope": "both", "max_candidates": 1, **IN_CHUNKS},
        {"async_scheduling": True, "apart": True},
    ),
    "directions": ({**WRITTEN, "candidates": "signature"}, ROOM),
    "directions, both, chunks, stages": (
        {**WRITTEN, "candidates": "both", "scope": "chunk", **IN_CHUNKS},
        {"pipeline_parallel_size": 3, **ROOM},
    ),
    "directions, asynchronous, two groups": (
        {**WRITTEN, "candidates": "signature", "layer_groups": 2},
        {"async_scheduling": True, "apart": True, **ROOM},
    ),
    "directions, both, asynchronous, full pool": (
        {**WRITTEN, "candidates": "both", "min_pool_usage": 0.5, "max_blocks_per_step": 6},
        {"async_scheduling": True, "scheduling_policy": "priority", **ROOM, "pages": 45},
    ),
    "directions, second runner": (
        {**WRITTEN, "candidates": "signature"},
        {"beside": [FILES], "second_runner": True, **ROOM},
    ),
    "directions, both, second runner, two groups": (
        {**WRITTEN, "candidates": "both", "layer_groups": 2},
        {"second_runner": True, "apart": True, **ROOM},
    ),
    "directions, second runner, asynchronous": (
        {**WRITTEN, "candidates": "signature"},
        {"second_runner": True, "async_scheduling": True, **ROOM},
    ),
    "directions, both, second runner, asynchronous, two groups": (
        {**WRITTEN, "candidates": "both", "layer_groups": 2},
        {"second_runner": True, "async_scheduling": True, "apart": True, **ROOM},
    ),
    "priorities, full pool": (
        {"min_pool_usage": 0.5, "max_blocks_per_step": 3},
        {"scheduling_policy": "priority"},
    ),
    "reuse": ({"reuse": "probed", "reuse_audit_rate": 0.2}, {}),
    "reuse, compared apart": ({"reuse": "probed", "reuse_audit_rate": 0.2}, {"apart": True}),
    "reuse, asynchronous": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, "scope": "both", **IN_CHUNKS},
        {"async_scheduling": True},
    ),
    "reuse, two stages": ({"reuse": "probed", "reuse_audit_rate": 0.1}, {"pipeline_parallel_size": 2}),
    "reuse, second runner": ({"reuse": "probed", "reuse_audit_rate": 0.1}, {"second_runner": True}),
    "reuse, second runner, asynchronous": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, "scope": "both", **IN_CHUNKS},
        {"second_runner": True, "async_scheduling": True, "apart": True},
    ),
    "reuse, moved text": ({"reuse": "probed", "reuse_audit_rate": 0.1, "moved": True}, {}),
    "reuse, moved text, asynchronous": (
        {**EARNED_SOON, "moved": True},
        {"second_runner": True, "async_scheduling": True, "apart": True},
    ),
    "reuse, in place": ({"reuse": "probed", "reuse_audit_rate": 0.1, **IN_PLACE}, {}),
    "reuse, in place, priorities": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, **IN_PLACE},
        {"scheduling_policy": "priority"},
    ),
    "reuse, in place, two stages": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, **IN_PLACE},
        {"pipeline_parallel_size": 2},
    ),
    "reuse, in place, second runner": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, **IN_PLACE},
        {"second_runner": True},
    ),
    "reuse, in place, asynchronous": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, **IN_PLACE},
        {"async_scheduling": True},
    ),
    "reuse, in place, second runner, asynchronous": (
        {**EARNED_SOON, **IN_PLACE},
        {"second_runner": True, "async_scheduling": True, "apart": True},
    ),
    "reuse, signatures": ({"reuse": "probed", "reuse_audit_rate": 0.2, "candidates": "both"}, {}),
    "reuse, priorities, licence": (
        {**EARNED_SOON, "min_pool_usage": 0.5},
        {"scheduling_policy": "priority"},
    ),
}
"""Options of the plugin, and of the engine and its worker."""


def combination(variant: str) -> tuple[bool, bool, bool]:
    """Whether it has the second runner, is a step ahead, and reuses."""
    fusion, options = VARIANTS[variant]
    return options.get("second_runner", False), options.get("async_scheduling", False), "reuse" in fusion


SHARES = Counter(map(combination, VARIANTS))
"""How many variants a combination has."""


def configuration(model: Path, fusion: dict[str, Any], options: dict[str, Any]) -> Any:
    """What the engine makes of its arguments."""
    attached = engine_args(
        options.get("beside", ()), **{"min_pool_usage": 0.0, "retry_after": 0.0, "max_faults": 16, **fusion}
    )
    config = EngineArgs(
        str(model),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        block_size=BLOCK,
        num_gpu_blocks_override=1 + options.get("pages", PAGES) * fusion.get("layer_groups", 1),
        max_model_len=LONGEST,
        max_num_seqs=8,
        max_num_batched_tokens=options.get("tokens", 24),
        scheduling_policy=options.get("scheduling_policy", "fcfs"),
        pipeline_parallel_size=options.get("pipeline_parallel_size", 1),
        kv_transfer_config=KVTransferConfig(**attached["kv_transfer_config"]),
        worker_cls=attached["worker_cls"],
        scheduler_cls=attached.get("scheduler_cls"),
    ).create_engine_config()
    # vLLM takes it back on the CPU.
    config.scheduler_config.async_scheduling = options.get("async_scheduling", False)
    return config
