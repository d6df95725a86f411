"""Every script finds what it imports; most of them are run by nobody for months."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", [script.stem for script in SCRIPTS])
def test_imports(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in ("aiohttp", "vllm"):
            raise
        pytest.skip(f"{missing.name} is in vLLM's environment, where this runs as well")
