"""vLLM's engine in this process, as several benchmarks build it, and the real text that they send."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jointkv.bench.environment import engine_environment
from jointkv.system.machine import allowed_cores

MODEL, BLOCK_SIZE, MAX_MODEL_LEN = "smollm2", 32, 2048
ANSWER = "MEASURED "


def prepare_environment(kv_bytes: int, cores: Collection[int] | None = None) -> None:
    """What vLLM shall find when it is imported; all cores unless some are given."""
    os.environ.update(engine_environment(os.environ, cores or allowed_cores(), kv_bytes, local_model=True))


def build(dtype: str, running: int, blocks: int, **options: Any) -> Any:
    """An engine for `running` requests at once with a pool of `blocks`; `options` are those of `vllm.EngineArgs`."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from jointkv.hf.models import fetch_model

    common = {
        "model": str(fetch_model(MODEL)),
        "dtype": dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": running,
        "max_num_batched_tokens": MAX_MODEL_LEN,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": blocks,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    return LLMEngine.from_engine_args(EngineArgs(**common | options))


def in_a_process_of_its_own(script: str, *arguments: str) -> Any:
    """What `script` tells with these arguments: vLLM has one engine at a time. Ends this program where it fails."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if not found:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr[-3000:]}")
    return json.loads(found[0].removeprefix(ANSWER))


def tell(found: Any) -> None:
    """Answer `in_a_process_of_its_own`, and end without waiting for the engine's threads."""
    print(ANSWER + json.dumps(found), flush=True)
    os._exit(0)


def scheduler_of(engine: Any) -> Any:
    """The scheduler of an engine in this process."""
    return engine.engine_core.engine_core.scheduler


def write_calm_model(folder: Path, context: float, **config: Any) -> str:
    """A random Llama of `config`; what was read before changes K and V of a token as little as `context` is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.0 if "embed" in name else weight.shape[1] ** -0.5)
            if "o_proj" in name:
                weight.mul_(context)
    model.save_pretrained(folder)
    return str(folder)


def corpus(tokenizer: Any) -> tuple[int, ...]:
    """Token ids of the novel and the reports that the package carries."""
    from jointkv.evaluate.jsonl import read_records
    from jointkv.evaluate.samples import packaged
    from jointkv.evaluate.traffic.base import encode

    reports = [record.fields["text"] for record in read_records(packaged("gov_report_sample.jsonl"))]
    return encode(tokenizer, "\n".join([packaged("novel_sample.txt").read_text(), *reports]))
