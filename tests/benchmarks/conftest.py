"""The scripts in `benchmarks/` import each other by name; those with an engine get the settings of its own tests."""

import sys
from pathlib import Path

from tests.vllm_plugin.conftest import _vllm_environment, calm  # noqa: F401

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
