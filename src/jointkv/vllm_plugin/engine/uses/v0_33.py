"""What the plugin uses of vLLM 0.33: what it uses of 0.32, but for what has moved."""

from __future__ import annotations

from dataclasses import replace

from jointkv.vllm_plugin.engine.uses import v0_32
from jointkv.vllm_plugin.engine.uses.v0_32 import ALWAYS, OVERRIDDEN

__all__ = ["ALWAYS", "ATTENTION", "OVERRIDDEN", "QUANTIZED"]

QUANTIZED = "vllm.v1.kv_cache_interface.is_quantized_kv_cache"
ATTENTION = {
    **v0_32.ATTENTION,
    "gpu": tuple(
        replace(use, owner=QUANTIZED.rpartition(".")[0]) if use == v0_32.QUANTIZED_PAGES else use
        for use in v0_32.GPU_ATTENTION
    ),
}
