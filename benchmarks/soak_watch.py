"""What the soak sees from outside: the server's metrics, and the memory, files and threads of all its processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from statistics import median
from typing import Any

import psutil
from scipy.stats import theilslopes

from jointkv.bench.server import Server
from jointkv.bench.watch import POOL_USAGE, PREEMPTIONS, RUNNING, WAITING, read

MIB = 2**20
GROWTH_ALLOWED = 0.02
"""Of the memory in the middle of the run: fitted growth over the whole run. See `memory_verdict`."""

LEAST_SECONDS = 300.0
"""A shorter run says nothing about growth."""


def processes(server: Server) -> dict[str, Any]:
    """Memory in MiB, open files and threads of the server's processes, added up.

    `own_mib` is without pages of files, which PSS and USS count by how many others on the machine have them mapped.
    """
    found = {"processes": 0, "rss_mib": 0.0, "own_mib": 0.0, "files": 0, "threads": 0}
    for process in server.processes():
        with suppress(psutil.Error):
            memory = process.memory_info()
            found["processes"] += 1
            found["rss_mib"] += memory.rss / MIB
            found["own_mib"] += (memory.rss - memory.shared) / MIB
            found["files"] += process.num_fds()
            found["threads"] += process.num_threads()
    return {name: round(value, 2) for name, value in found.items()}


def sample(server: Server, began: float) -> dict[str, Any]:
    """One line of the timeline."""
    metrics = read(server.url)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "running": metrics[RUNNING],
        "waiting": metrics[WAITING],
        "pool_usage": round(metrics[POOL_USAGE], 4),
        "preemptions": metrics.get(PREEMPTIONS, 0.0),
        "merged": metrics.get("jointkv_blocks_merged_total", 0.0),
        **processes(server),
    }


async def keep_samples(server: Server, every: float, samples: list[dict[str, Any]], say: Any) -> None:
    """Add to `samples` until cancelled."""
    began = time.monotonic()
    while True:
        with suppress(OSError):  # a busy server may answer late
            samples.append(await asyncio.to_thread(sample, server, began))
            say(samples[-1])
        await asyncio.sleep(every)


async def drained(server: Server, seconds: float = 30.0) -> dict[str, float]:
    """The metrics once nothing runs, waits or holds a page, or when the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        metrics = await asyncio.to_thread(read, server.url)
        if not (metrics[RUNNING] or metrics[WAITING] or metrics[POOL_USAGE]) or time.monotonic() > deadline:
            return metrics
        await asyncio.sleep(0.2)


def memory_verdict(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether memory was flat: the growth that a robust line (Theil and Sen) through own memory shows.

    Flat means less than `GROWTH_ALLOWED` of the median over the run, or a 95% interval of the slope that includes 0.
    """
    seconds = [one["seconds"] for one in samples]
    if len(seconds) < 3 or seconds[-1] - seconds[0] < LEAST_SECONDS:
        return {"judged": False}
    memory = [one["own_mib"] for one in samples]
    slope, _, low, high = theilslopes(memory, seconds)
    length = seconds[-1] - seconds[0]
    return {
        "judged": True,
        "flat": bool(slope * length < GROWTH_ALLOWED * median(memory) or low <= 0),
        "median_mib": round(median(memory), 1),
        "growth_mib": round(slope * length, 2),
        "growth_mib_per_hour": round(slope * 3600, 2),
        "growth_mib_per_hour_95": [round(low * 3600, 2), round(high * 3600, 2)],
    }
