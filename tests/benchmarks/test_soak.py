"""The soak of `benchmarks/soak.py`, briefly: the same server, load and checks."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import soak
from soak_watch import memory_verdict

LOAD_SECONDS = 15


@pytest.mark.timeout(400)
@pytest.mark.hazard(
    "Soak",
    "random load at a full pool (aborts, disconnects, preemptions, salts, chunks, prefix hits, resets) loses a "
    "request, corrupts an answer, mixes tenants, or leaks pages, files or threads",
    "zero violations; see make soak for 20 minutes with memory",
)
@pytest.mark.slow
@pytest.mark.parametrize("arm", ["lossy", pytest.param("exact", marks=pytest.mark.nightly)])
def test_soak(arm: str, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    file = tmp_path / "soak.json"
    command = [sys.executable, soak.__file__, "--minutes", str(LOAD_SECONDS / 60), "--arm", arm]
    ended = subprocess.run([*command, "--output", str(file)], capture_output=True, text=True, timeout=380)
    assert file.exists(), ended.stderr[-4000:]
    found = json.loads(file.read_text())["arms"][arm]
    counts, violations = found["counts"], found["violations"]
    assert not any(violations.values()) and ended.returncode == 0, (violations, found["lost"])
    assert counts["ended"].keys() >= {"finished", "left", "aborted"} and counts["ended"]["finished"] > 20
    assert counts["prefix_hit_tokens"] > 0 and counts["witness"]["merges"] > 0  # seconds of load need not preempt
    assert found["compared"]["requests"] > 10
    for name in ("requests", "preemptions", "tokens_received"):
        record_property(name, counts[name])
    record_property("merges", counts["witness"]["merges"])
    record_property("violations", sum(violations.values()))


@pytest.mark.parametrize(
    ("growth", "flat"), [(0.0, True), (-0.05, True), (0.01, True), (0.05, False)], ids=["none", "less", "1%", "5%"]
)
def test_growth_is_noticed(growth: float, flat: bool) -> None:
    draw = random.Random(0)
    samples = [
        {"seconds": 5.0 * number, "own_mib": 1000 * (1 + growth * number / 240) + draw.gauss(0, 3)}
        for number in range(241)
    ]
    samples[100]["own_mib"] += 400  # a peak is no growth
    assert memory_verdict(samples)["flat"] is flat
    assert memory_verdict(samples[:20]) == {"judged": False}


def test_a_near_tie_is_no_difference() -> None:
    best = {"token_id:7": -0.7, "token_id:8": -0.7004}
    assert soak.near_tie(best, 8) and soak.near_tie(best, 7)
    assert not soak.near_tie(best, 9) and not soak.near_tie({"token_id:7": -0.1, "token_id:8": -2.0}, 8)
