"""The environment of vLLM's engines, the same for all that are compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jointkv.system.machine import core_list

GIB = 2**30


def engine_environment(
    inherited: Mapping[str, str], cores: Collection[int], kv_bytes: int, local_model: bool
) -> dict[str, str]:
    """`inherited` with the engine in the process that starts it, on `cores`, and room for the KV pool.

    Args:
        kv_bytes: size of the largest pool of all engines; vLLM takes whole GiB.
        local_model: the model is a folder, so nothing may be looked up on the hub.
    """
    return {
        **inherited,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Left to itself vLLM reserves one core more when a connector is set: the arms would differ.
        "VLLM_CPU_OMP_THREADS_BIND": core_list(cores),
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, -(-kv_bytes // GIB))),
        "VLLM_NO_USAGE_STATS": "1",
        **({"HF_HUB_OFFLINE": "1"} if local_model else {}),
    }


def server_environment(
    inherited: Mapping[str, str], cores: Collection[int], kv_bytes: int, local_model: bool
) -> dict[str, str]:
    """`engine_environment` with the engine in a process of its own, and what a benchmark asks of its server."""
    return {
        **engine_environment(inherited, cores, kv_bytes, local_model),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # where /reset_prefix_cache is
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_LOGGING_COLOR": "0",
    }
