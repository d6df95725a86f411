"""A stage of `gpu_proof.py`: `python gpu_proof_stages.py STAGE FOLDER` prints what it found, or fails.

Engines, requests and checks are those of the tests of vLLM's second model runner; `JOINTKV_TEST_DEVICE` says whether
they run on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ON_GPU = os.environ.get("JOINTKV_TEST_DEVICE") == "cuda"
UNTRIED = {"allow_untested": True}
"""The plugin refuses a device that it was never run on."""

Found = dict[str, Any]


def versions(folder: Path) -> Found:
    """What is installed, and whether it has what the plugin uses."""
    import torch
    import triton

    from jointkv.vllm_plugin.connector import PARTS
    from jointkv.vllm_plugin.engine.uses import check_interfaces, is_tested, vllm_version

    check_interfaces(PARTS)
    gpu = {}
    if ON_GPU:
        of = torch.cuda.get_device_properties(0)
        gpu = {
            "gpu": of.name,
            "capability": f"{of.major}.{of.minor}",
            "bytes": of.total_memory,
            "cuda": torch.version.cuda,
        }
    tested = is_tested(vllm_version())
    return {"vllm": vllm_version(), "tested": tested, "torch": torch.__version__, "triton": triton.__version__, **gpu}


def serve(folder: Path, name: str, **options: Any) -> Found:
    """A case of the second runner's tests; its model is written once."""
    from tests.vllm_plugin import second_runner

    return second_runner.serve(second_runner.model_in(folder), name, UNTRIED, **options)


def same(folder: Path, *names: str, stock: str = "stock", merges: bool = True, **options: Any) -> Found:
    """Each case answers as the stock engine does, token for token, and merges."""
    expected, found = serve(folder, stock, **options), {}
    for name in names:
        case = serve(folder, name, **options)
        assert case["faults"] == 0, (name, case)
        assert case["tokens"] == expected["tokens"], (name, case["tokens"], expected["tokens"])
        assert (case["blocks_merged"] > 0) == merges, (name, case["blocks_merged"])
        found[name] = {key: value for key, value in case.items() if key != "tokens"}
    return found


def stock(folder: Path) -> Found:
    return {"tokens": serve(folder, "stock")["tokens"]}


def off(folder: Path) -> Found:
    return same(folder, "off", merges=False)


def equal(folder: Path) -> Found:
    return same(folder, "equal")


def ahead(folder: Path) -> Found:
    return same(folder, "equal, asynchronous")


def crowd(folder: Path) -> Found:
    found = same(folder, "crowd", "crowd, asynchronous", stock="stock, crowd")
    assert all(case["preempted"] for case in found.values()), found
    return found


def reuse(folder: Path) -> Found:
    found = {name: serve(folder, name) for name in ("reuse", "reuse, asynchronous")}
    assert all(case["prompt_tokens_skipped"] and not case["faults"] for case in found.values()), found
    return {name: case["prompt_tokens_skipped"] for name, case in found.items()}


def norms(folder: Path) -> Found:
    found = {name: serve(folder, name) for name in ("norms", "norms, asynchronous")}
    for case in found.values():
        fault, steps, shared = case["attention"]
        assert fault is None and 0 < steps == shared and case["factors"] > 0, case
    return {name: case["attention"] for name, case in found.items()}


def layouts(folder: Path) -> Found:
    """Pages are what the plugin takes them for, which it proves by writing one, in the layout of every backend."""
    return each_backend(folder, "off", merges=False)


def backends(folder: Path) -> Found:
    return each_backend(folder, "equal", merges=True)


def each_backend(folder: Path, case: str, merges: bool) -> Found:
    """For each that can be chosen here; what cannot says why, and one has to."""
    found: Found = {}
    for name, dtype in (("TRITON_ATTN", "bfloat16"), ("FLASH_ATTN", "bfloat16"), ("FLASHINFER", "bfloat16")):
        try:
            serve(folder, "stock", dtype=dtype, attention_backend=name)
        except Exception as error:
            found[name] = f"not here: {' '.join(str(error).split())[-300:]}"
            continue
        found[name] = same(folder, case, merges=merges, dtype=dtype, attention_backend=name)
    assert any(isinstance(one, dict) for one in found.values()), found
    return found


def pieces(folder: Path) -> Found:
    return with_graphs(folder, "PIECEWISE")


def graphs(folder: Path) -> Found:
    return with_graphs(folder, "FULL")


def with_graphs(folder: Path, mode: str) -> Found:
    return same(
        folder,
        "equal",
        "equal, asynchronous",
        enforce_eager=False,
        compilation_config={"cudagraph_mode": mode},
        dtype="bfloat16",
    )


def bandwidth(folder: Path) -> Found:
    """Of decode and prefill kernels; goals stand in `gpu_proof.py`."""
    import torch

    import kernels_gpu

    return kernels_gpu.measure(torch.device("cuda"), repeats=5)


ARMS: dict[str, Found | None] = {
    "stock": None,
    "off": {"enabled": False},
    "fused": {"max_relative_error": 0.9, "max_token_error": None},
    "reuse": {"max_relative_error": 0.9, "max_token_error": None, "reuse": "probed", "reuse_audit_rate": 1e-9},
}
"""Options of the plugin; None is stock."""

SECONDS = ("compare_seconds", "schedule_seconds", "apply_seconds")
"""What the plugin counts of its own work."""


class Load:
    """Near prefixes and an engine of a realistic shape on a GPU, tiny ones elsewhere."""

    def __init__(self, folder: Path) -> None:
        from tests.vllm_plugin import second_runner
        from tests.vllm_plugin.engines import near_prefix

        self.requests, self.out = (32, 64) if ON_GPU else (4, 4)
        shared, self.block_size = (1024, 16) if ON_GPU else (160, 32)
        self.prompts = near_prefix(self.requests, shared=shared, head=self.block_size, tail=self.block_size)
        self.slots = -(-(len(self.prompts[0]) + self.out) // self.block_size)
        self.model = self._write(folder) if ON_GPU else second_runner.model_in(folder)
        self.options: Found = {"max_model_len": len(self.prompts[0]) + self.out, "block_size": self.block_size}
        if ON_GPU:
            self.options |= {"load_format": "dummy", "dtype": "bfloat16", "enforce_eager": False}
            self.options |= {"async_scheduling": True, "max_num_batched_tokens": 8192}

    def _write(self, folder: Path) -> Path:
        """Eight layers of a Llama-8B: its configuration alone, weights are made up by vLLM."""
        from transformers import LlamaConfig

        model = folder / "eight_layers"
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=8,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=32_000,
            max_position_embeddings=8192,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        ).save_pretrained(model)
        return model

    @contextmanager
    def engine(self, arm: str, pages: int) -> Iterator[Any]:
        from tests.vllm_plugin.engines import engine

        fusion = ARMS[arm]
        fusion = None if fusion is None else {**fusion, **UNTRIED, "check_integrity": False}
        with engine(self.model, pages, fusion, **self.options) as served:
            yield served


def steps(folder: Path) -> Found:
    """Decode steps of all requests at once in a pool with room: median ms, and shares of the time in the plugin."""
    load, found = Load(folder), {}
    for arm in ARMS:
        with load.engine(arm, 1 + load.requests * load.slots) as served:
            for prompt in load.prompts:
                served.submit(prompt, load.out)
            served.run_until_decoding()
            before, taken = {} if arm == "stock" else served.statistics, []
            while served.vllm_scheduler.requests:
                start = time.perf_counter()
                served.step()
                taken.append(time.perf_counter() - start)
            after = {} if arm == "stock" else served.statistics
            shares = {f"{name}_share": (after[name] - before[name]) / sum(taken) for name in SECONDS if name in after}
            taken = taken[1 : max(len(taken) - 2, 2)]
            found[arm] = {"decode_ms": 1e3 * median(taken), "steps": len(taken), **shares}
    return {"requests": load.requests, "context": len(load.prompts[0]), "arms": found}


def contended(folder: Path) -> Found:
    """One request first, then all others at once, in a pool with room for a quarter of them."""
    load, found = Load(folder), {}
    for arm in ("stock", "fused", "reuse"):
        with load.engine(arm, 1 + max(load.requests * load.slots // 4, load.slots + 4)) as served:
            served.generate(load.prompts[:1], 1)
            computed = count_tokens(served)
            start = time.perf_counter()
            names = [served.submit(prompt, load.out) for prompt in load.prompts[1:]]
            first: dict[str, float] = {}
            while served.vllm_scheduler.requests:
                served.step()
                for request in list(served.vllm_scheduler.requests.values()):
                    if request.num_output_tokens:
                        first.setdefault(request.request_id, time.perf_counter() - start)
            seconds = time.perf_counter() - start
            waits = sorted(wait for name, wait in first.items() if "-gap-" not in name)
            found[arm] = {
                "output_tokens_per_s": len(names) * load.out / seconds,
                "ttft_p50": median(waits),
                "ttft_p95": waits[int(0.95 * (len(waits) - 1))],
                "tokens_computed": computed(),
                "preempted": served.preempted,
                **({} if arm == "stock" else {key: served.statistics[key] for key in ("pages_freed", "faults")}),
            }
    assert not any(arm.get("faults") for arm in found.values()), found
    assert found["reuse"]["tokens_computed"] < found["stock"]["tokens_computed"], found
    return found


def count_tokens(served: Any) -> Callable[[], int]:
    """Tells how many tokens were scheduled since."""
    scheduler, counted = served.vllm_scheduler, [0]
    schedule = scheduler.schedule

    def watched(*args: Any, **options: Any) -> Any:
        output = schedule(*args, **options)
        counted[0] += output.total_num_scheduled_tokens
        return output

    scheduler.schedule = watched
    return lambda: counted[0]


STAGES: dict[str, Callable[[Path], Found]] = {
    stage.__name__: stage
    for stage in (
        *(versions, stock, off, layouts, equal, ahead, crowd, reuse, norms),
        *(pieces, graphs, backends, steps, contended, bandwidth),
    )
}

if __name__ == "__main__":
    print(json.dumps(STAGES[sys.argv[1]](Path(sys.argv[2]))))
