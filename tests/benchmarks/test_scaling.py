"""The simulator of `benchmarks/scaling.py`, small: the real scheduler side plans and merges without a model."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import scaling
from scaling_engine import Engine


def test_growth_is_a_slope_of_logarithms() -> None:
    sizes = [10, 100, 1000]
    for power in (0.0, 0.5, 1.0):
        assert scaling.slope(sizes, [3e-6 * size**power for size in sizes]) == pytest.approx(power)


def test_the_summary_says_growth_memory_and_what_eight_gpus_need() -> None:
    """A thousandth of a second for every request, a millionth for a token, 500 bytes for a block, and none grows."""
    rows = [
        {"part": part, "arm": arm, "size": size, "requests": 8, "tokens": 1000, "bytes": 500 * size}
        | {"seconds": 0.001 if part == "running" else 0.008}
        for part, arms in scaling.ARMS_OF.items()
        for arm in arms
        for size in (10, 100)
    ]
    headline = scaling.summary(rows)["headline"]
    assert set(headline["growth"].values()) == {0.0}
    assert headline["bytes_per_resident_block"] == dict.fromkeys(scaling.ARMS_OF["residents"], 500)
    load = scaling.EIGHT_GPUS
    expected = load["tokens_per_s"] * 1e-6 + load["requests_per_s"] * 1e-3
    assert headline["eight_gpus"]["reuse"] == headline["eight_gpus"]["stock"] == pytest.approx(expected)


def test_requests_are_planned_merged_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)
    callbacks = list(gc.callbacks)
    try:
        engine = Engine(tmp_path, "reuse", 1000, 8)
        for number in range(12):
            engine.submit(scaling.prompt(number, 0, 20), 2)
        engine.drain()
        spent, counted = engine.take()
        assert engine.resident >= 20 and counted["blocks_considered"] and counted["blocks_merged"]
        assert spent.pairs and spent.inquiry_bytes and spent.tokens and len(spent.seconds)
        assert engine.take()[0].tokens == 0
        engine.side.check_integrity()
    finally:
        gc.callbacks[:] = callbacks
        gc.unfreeze()
