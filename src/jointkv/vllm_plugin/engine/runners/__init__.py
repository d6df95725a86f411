"""The workers' block tables, one file for each of vLLM's model runners.

A new model runner is one more file and a line in `RUNNERS`. Imports no vllm.
"""

from __future__ import annotations

from typing import Any

from jointkv.vllm_plugin.engine.runners.base import WorkerTables
from jointkv.vllm_plugin.engine.runners.v1 import V1Tables
from jointkv.vllm_plugin.engine.runners.v2 import V2Tables

RUNNERS: dict[str, type[WorkerTables]] = {"V1": V1Tables, "V2": V2Tables}


def runner_of(config: Any) -> str:
    """The name of the model runner that an engine of this `VllmConfig` has."""
    return "V2" if config.use_v2_model_runner else "V1"
