"""Times of several works in turns, what the machine can do at most, and the JSON of every benchmark of this folder."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from jointkv.system.files import replace_text
from jointkv.system.machine import machine

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""Processor time leaves out what others on the machine take away, but tells nothing about several cores."""


def timed(work: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> list[float]:
    """Seconds of `repeats` calls after `warmup` uncounted ones."""
    return paired([work], repeats, warmup)[0]


def paired(
    works: Sequence[Callable[[], Any]], repeats: int = 5, warmup: int = 1, clock: str = "wall"
) -> list[list[float]]:
    """Seconds of several works, taken in turns so that a drift of the machine meets all alike."""
    samples: list[list[float]] = [[] for _ in works]
    now = CLOCKS[clock]
    for turn in range(warmup + repeats):
        for work, seconds in zip(works, samples, strict=True):
            start = now()
            work()
            if turn >= warmup:
                seconds.append(now() - start)
    return samples


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over repeats of the pairwise ratio."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """torch computes on so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine_speed(dtype: torch.dtype = torch.float32, clock: str = "wall") -> dict[str, float]:
    """Bytes per second of a large copy (read and written bytes), operations per second of a large matrix product."""
    large = torch.ones(64 * 2**20)
    target, matrix = torch.empty_like(large), torch.randn(2048, 2048).to(dtype)
    copies, products = paired([lambda: target.copy_(large), lambda: matrix @ matrix], clock=clock)
    return {"copy_bytes_per_s": 2 * large.nbytes / min(copies), "operations_per_s": 2 * 2048**3 / min(products)}


def write(path: Path, name: str, result: dict[str, Any]) -> None:
    """Write a benchmark's result with the machine it ran on into the folder `path`, and print the headline numbers."""
    where = {
        "processor": machine()["processor"],
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    document = {"benchmark": name, "machine": where, **result}
    replace_text(path / f"{name}.json", json.dumps(document, indent=2) + "\n")
    print(f"{name}: " + json.dumps(result.get("headline", {})), flush=True)
