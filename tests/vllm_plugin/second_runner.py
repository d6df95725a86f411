"""Serves with vLLM's second model runner on a CPU, its Triton kernels in Triton's interpreter.

Run as `python second_runner.py FOLDER CASE...`, in a process of its own. Prints a line of JSON for every case.
Tables of scheduler and worker are compared in every step. With `JOINTKV_TEST_DEVICE=cuda` a GPU does the same.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from tests.vllm_plugin.conftest import ENVIRONMENT

if os.environ.get("JOINTKV_TEST_DEVICE") != "cuda":
    import tests.vllm_plugin.interpreted  # noqa: F401
os.environ.update(ENVIRONMENT)
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")

import torch
from vllm import SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.worker.gpu.warmup import warmup_kernels

from jointkv.vllm_plugin.scheduler import side, stored
from tests.vllm_plugin.census import Census
from tests.vllm_plugin.engines import (
    BOLD,
    EXACT,
    LOSSY,
    Engine,
    engine,
    near_prefix,
    text,
    write_model,
)
from tests.vllm_plugin.test_reuse_traffic import Traffic

OUT = 12
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
EQUAL = [text(90, number // 2) for number in range(6)]
ALIKE = near_prefix(6, shared=160, head=32)
MOVED = [text(32 + 5 * number, number) + text(160, 99) + text(20, 10 + number) for number in range(3)]
MOVED_COUNTERS = ("moved_tokens_skipped", "pages_filled", "blocks_in_place")
PREFIX, BODY = text(64, 50), text(160, 51)
WRITTEN = {"directions": "written", "candidates": "signature", "similarity": "key", "key_threshold": 0.8}
NORMS = {"max_relative_error": 0.5, "max_token_error": None, "own_norms": True}
PROBED = {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}
EVENTS = int(os.environ.get("JOINTKV_TEST_EVENTS", "60"))

torch.set_num_threads(1)
side.ReuseRule = BOLD
stored.LOOK_UP_S = 100.0

Found = dict[str, Any]


def answers(served: Engine) -> Found:
    """All at once, and everything fits."""
    return {"tokens": served.generate(EQUAL, OUT)}


def crowd(served: Engine) -> Found:
    """More than fit, some of whom go away: those that stay are answered."""
    names = [served.submit(text(90, number // 2), OUT) for number in range(12)]
    for step in range(12):
        served.step()
        if step in (4, 9):
            served.abort(names[step])
    served.finish()
    staying = [name for name in names if name not in (names[4], names[9])]
    return {"tokens": [served.outputs[name] for name in staying]}


def one_after_the_other(served: Engine) -> Found:
    """The first is there when the others come."""
    return {"tokens": [*served.generate(ALIKE[:1], OUT), *served.generate(ALIKE[1:], OUT)]}


def a_prefix(served: Engine) -> Found:
    """It is all that is stored."""
    return {"tokens": served.generate([PREFIX + text(5, 52)], 1)}


def behind_a_prefix(served: Engine) -> Found:
    """A prompt begins with it, and goes on with what is resident behind another one."""
    served.generate([text(64, 53) + BODY + text(20, 54)], 1)
    return {"tokens": served.generate([PREFIX + BODY + text(20, 55)], 2)}


def behind_other_lengths(served: Engine) -> Found:
    """The first is there when the others come, whose heads are longer."""
    tokens = [*served.generate(MOVED[:1], OUT), *served.generate(MOVED[1:], OUT)]
    return {"tokens": tokens, **{name: served.statistics[name] for name in MOVED_COUNTERS}}


def together(served: Engine) -> Found:
    """Near requests at once; how many blocks keep their own norms while they run."""
    names = [served.submit(prompt, OUT) for prompt in ALIKE[:4]]
    served.run_until_decoding()
    for _ in range(5):
        served.step()
    worker = get_kv_transfer_group().worker
    factors = 0 if worker.norms is None else len(worker.norms)
    served.finish()
    (reading,) = worker.readings.values()
    found = {"factors": factors, "attention": [reading.fault, reading.steps, reading.shared_steps]}
    return {"tokens": [served.outputs[name] for name in names], **found}


def warm_up(served: Engine) -> None:
    """By the steps that vLLM takes for it on a GPU, with the connector put away; its sampler cannot be interpreted."""
    worker = served.core.model_executor.driver_worker.worker
    with (
        patch.object(torch.accelerator, "synchronize"),
        patch.object(SamplingParams, "for_sampler_warmup", lambda: SamplingParams(temperature=0)),
    ):
        warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)


def anything(served: Engine) -> Found:
    """Random requests, aborts and resets."""
    served.side.reuse.look_up.draw = random.Random(7).random
    traffic = Traffic(served, 7, priorities=False)
    traffic.run(EVENTS)
    short = [name for name, tokens in served.outputs.items() if len(tokens) != traffic.asked[name]]
    keys = {key[:-4] for key in served.pool.cached_block_hash_to_block._cache}
    return {"short": short, "private": len(keys & traffic.private), "answered": len(served.outputs)}


class Case(NamedTuple):
    play: Callable[[Engine], Found]
    fusion: dict[str, Any] | None
    pages: int = 60
    options: Mapping[str, Any] = MappingProxyType({})
    before: Callable[[Engine], None] = lambda served: None


LIMITS = {"max_model_len": 416, "max_num_batched_tokens": 128, "max_num_seqs": 8}
UNCACHED: dict[str, Any] = {"enable_prefix_caching": False}
TIGHT = 14  # a request has three or four
CASES = {
    "stock": Case(answers, None, options=UNCACHED),
    "stock, crowd": Case(crowd, None, options=UNCACHED),
    "equal": Case(answers, EXACT, options=UNCACHED),
    "off": Case(answers, {"enabled": False}, options=UNCACHED),
    "warmed up": Case(answers, EXACT, options=UNCACHED, before=warm_up),
    "crowd": Case(crowd, EXACT, TIGHT, UNCACHED),
    "crowd, two groups": Case(crowd, {**EXACT, "layer_groups": 2}, 2 * TIGHT, UNCACHED),
    "reuse": Case(one_after_the_other, PROBED),
    "moved": Case(behind_other_lengths, {**PROBED, "moved": True}),
    "in place": Case(behind_other_lengths, {**PROBED, "moved": True, "attention": "shared"}),
    "norms": Case(together, NORMS, options=UNCACHED),
    "directions": Case(together, {**NORMS, **WRITTEN}, options={"max_num_batched_tokens": 1024}),
    "crowd, drafts": Case(crowd, EXACT, TIGHT, {**UNCACHED, "speculative_config": DRAFTS}),
    "norms, drafts": Case(together, NORMS, options={**UNCACHED, "speculative_config": DRAFTS}),
    "stored": Case(answers, {**EXACT, "store": "pages"}),
    "loaded": Case(answers, {**EXACT, "store": "pages"}),
    "prefix stored": Case(a_prefix, {**PROBED, "store": "prefix"}),
    "behind it": Case(behind_a_prefix, {**PROBED, "store": "prefix"}),
    "anything": Case(anything, LOSSY, 30),
    "anything, reuse": Case(anything, PROBED, 40),
}


def model_in(folder: Path) -> Path:
    """A small random model, written once."""
    return folder if (folder / "config.json").exists() else write_model(folder, context=0.15, layers=2)


def serve(model: Path, name: str, more: Mapping[str, Any] = MappingProxyType({}), **others: Any) -> Found:
    """Play a case; `", asynchronous"` at the end of its name schedules a step ahead.

    Args:
        more: options of the plugin.
        others: of the engine.
    """
    case, asynchronous = CASES[name.removesuffix(", asynchronous")], name.endswith(", asynchronous")
    options = {**LIMITS, "async_scheduling": asynchronous, **case.options, **others}
    fusion = None if case.fusion is None else {**case.fusion, **more}
    if fusion is not None and "store" in fusion:
        fusion["store"] = str(model / fusion["store"])  # what a case finds there an earlier one has written
    with pytest.MonkeyPatch.context() as monkeypatch, engine(model, case.pages, fusion, **options) as served:
        assert served.core.vllm_config.scheduler_config.async_scheduling == asynchronous
        case.before(served)
        if case.fusion is None:
            return {**case.play(served), "preempted": served.preempted}
        census = None if asynchronous else Census(served, monkeypatch)
        found = {"runner": type(get_kv_transfer_group().worker.tables).__name__, **case.play(served)}
        served.assert_drained()
        counted = {
            name: served.statistics[name]
            for name in (
                *("blocks_merged", "blocks_merged_by_direction", "directions_written", "pages_freed", "faults"),
                *("prompt_tokens_skipped", "store_tokens_loaded"),
            )
        }
        checks = None if census is None else census.checks
        counted |= {"preempted": served.preempted, "drafted": served.drafted}
        return {**found, **counted, "checks": checks, "steps": served.steps}


def main(folder: Path, names: list[str]) -> None:
    """Serve the cases."""
    model = model_in(folder)
    for name in names:
        print(json.dumps({"case": name, **serve(model, name)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
