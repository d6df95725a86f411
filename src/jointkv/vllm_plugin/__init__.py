"""The vLLM plugin: fusion inside a serving engine. Besides it, only the benchmark imports vllm, to run it stock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jointkv.errors import BadInput
from jointkv.vllm_plugin.settings import PluginSettings

CONNECTOR = "JointConnector"
CONNECTOR_MODULE = "jointkv.vllm_plugin.connector"
WORKERS = {
    "cpu": "jointkv.vllm_plugin.worker.cpu.JointCPUWorker",
    "gpu": "jointkv.vllm_plugin.worker.gpu.JointGPUWorker",
}
SCHEDULER = "jointkv.vllm_plugin.engine.scheduler.JointScheduler"
LOADS = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
"""What vLLM must know of a connector that loads pages: what it cannot load is computed."""

REQUEST_CHECK = "jointkv.vllm_plugin.engine.opt_out:RequestCheck"


def engine_args(beside: Sequence[dict[str, Any]] = (), **options: Any) -> dict[str, Any]:
    """Engine arguments that turn fusion on: `LLM(model, **engine_args(max_relative_error=0.1))`.

    Args:
        beside: other KV connectors, each as in `kv_transfer_config`. vLLM loads from the first that has something.
        options: as in `PluginSettings`.

    Returns:
        `kv_transfer_config`, `worker_cls`, `logits_processors` (to which others may be added) and, where the options
        reuse, have a store or write directions, or others stand beside, `scheduler_cls`: for `vllm.LLM` or
        `vllm.EngineArgs`.

    Raises:
        BadInput, InvalidPolicy: see `PluginSettings.parse`; or `beside` is something else, or a store is to be there.
    """
    if not isinstance(beside, Sequence) or not all(
        isinstance(each, Mapping) and "kv_connector" in each for each in beside
    ):
        raise BadInput(
            "jointkv: beside lists other connectors as kv_transfer_config has them; options are given by name, as in "
            "engine_args(max_relative_error=0.1)"
        )
    if PluginSettings.parse(options).store is not None and beside:
        raise BadInput("jointkv: store does not go with other KV connectors, which store pages too; leave one out")
    from vllm.platforms import current_platform

    arguments = arguments_for("cpu" if current_platform.is_cpu() else "gpu", options)
    if not beside:
        return arguments
    connectors = [arguments["kv_transfer_config"], *beside]
    several = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    return {
        **arguments,
        "scheduler_cls": SCHEDULER,
        "kv_transfer_config": {**several, "kv_connector_extra_config": {"connectors": connectors}},
    }


def arguments_for(device: str, options: dict[str, Any]) -> dict[str, Any]:
    """`engine_args` for `device`, `"cpu"` or `"gpu"`, with options already checked. Imports no vllm."""
    settings = PluginSettings.parse(options)
    needed = settings.reuses or settings.store is not None or settings.writes_directions
    scheduler = {"scheduler_cls": SCHEDULER} if needed else {}
    transfer = LOADS if settings.store is not None else {"kv_role": "kv_producer"}
    return {
        **scheduler,
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            **transfer,
            "kv_connector_extra_config": options,
        },
        "logits_processors": [REQUEST_CHECK],
        "worker_cls": WORKERS[device],
    }
