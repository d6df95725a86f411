"""Serves prompts with the GPU's attention on a CPU: vLLM's Triton kernels and ours in Triton's interpreter.

Run as `python interpreted_engine.py FOLDER`, in a process of its own, because vLLM decides when it is imported whether
there is Triton. Prints a line of JSON for every case: the tokens of every prompt, and what was merged and shared.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tests.vllm_plugin.interpreted  # noqa: F401

os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from jointkv.vllm_plugin.attention import gpu as gpu_attention
from jointkv.vllm_plugin.worker.cpu import JointCPUWorker
from tests.vllm_plugin.engines import Engine, engine, near_prefix, text, write_model

OUT = 5
OPTIONS = {"max_num_batched_tokens": 128, "enable_chunked_prefill": True, "enable_prefix_caching": False}
EQUAL = [text(70, number // 2) for number in range(4)]
ALIKE = near_prefix(3, shared=80)
CLOSE = {"max_relative_error": 1e-3, "max_token_error": None}
NORMS = {"max_relative_error": 0.5, "max_token_error": None, "own_norms": True}
CASES: dict[str, tuple[list[list[int]], dict[str, Any], bool]] = {
    "stock": (EQUAL, CLOSE, False),
    "shared": (EQUAL, {**CLOSE, "attention": "shared"}, False),
    "broken": (EQUAL, {**CLOSE, "attention": "shared"}, True),
    "norms": (ALIKE, NORMS, False),
    "norms broken": (ALIKE, NORMS, True),
}


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The platform takes the backend that it is told to take, else Triton's, and the worker does as the GPU's does."""

    def choose(selected: AttentionBackendEnum | None, **_: Any) -> str:
        return (selected or AttentionBackendEnum.TRITON_ATTN).get_path()

    with (
        patch.object(CpuPlatform, "get_attn_backend_cls", staticmethod(choose)),
        patch.object(JointCPUWorker, "_attention", lambda worker: gpu_attention.registered(worker.vllm_config)),
    ):
        yield


def serve(served: Engine, prompts: list[list[int]], breaks: bool) -> dict[str, Any]:
    """The tokens, and what the plugin did; the kernel may fail in a step in which some decode."""
    names = [served.submit(prompt, OUT) for prompt in prompts]
    served.run_until_decoding()
    for _ in range(2):
        served.step()
    norms = get_kv_transfer_group().worker.norms
    factors = 0 if norms is None else len(norms)
    planted = patch.object(gpu_attention.JointGPUAttention, "kernel", side_effect=RuntimeError("planted"))
    with planted if breaks else nullcontext():
        served.finish()
    served.assert_drained()
    (layer, *_) = served.core.vllm_config.compilation_config.static_forward_context.values()
    found = {
        "attention": type(layer.impl).__name__,
        "tokens": [served.outputs[name] for name in names],
        "merged": served.statistics["blocks_merged"],
        "faults": served.statistics["faults"],
        "factors": factors,
    }
    reading = getattr(layer.impl, "reading", None)
    if reading is not None:
        found |= {"fault": reading.fault, "steps": reading.steps, "shared_steps": reading.shared_steps}
    return found


def main(folder: Path) -> None:
    """Serve every case."""
    model = write_model(folder, context=0.15, layers=2)
    for name, (prompts, fusion, breaks) in CASES.items():
        with (
            as_on_a_gpu(),
            engine(model, 60, fusion, **OPTIONS) as served,
        ):
            print(json.dumps({"case": name, **serve(served, prompts, breaks)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
