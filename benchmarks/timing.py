"""Medians, and JSON for every benchmark of this folder."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from jointkv.system.files import replace_text


def timed(work: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> list[float]:
    """Seconds of `repeats` calls after `warmup` uncounted ones."""
    return paired([work], repeats, warmup)[0]


def paired(works: list[Callable[[], Any]], repeats: int = 5, warmup: int = 1) -> list[list[float]]:
    """Seconds of several works, taken in turns so that a drift of the machine meets all alike."""
    samples: list[list[float]] = [[] for _ in works]
    for turn in range(warmup + repeats):
        for work, seconds in zip(works, samples, strict=True):
            start = time.perf_counter()
            work()
            if turn >= warmup:
                seconds.append(time.perf_counter() - start)
    return samples


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over repeats of the pairwise ratio."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def write(path: Path, name: str, result: dict[str, Any]) -> None:
    """Write a benchmark's result with the machine it ran on, and print the headline numbers."""
    machine = {
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    document = {"benchmark": name, "machine": machine, **result}
    replace_text(path / f"{name}.json", json.dumps(document, indent=2) + "\n")
    print(f"{name}: " + json.dumps(result.get("headline", {})), flush=True)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
