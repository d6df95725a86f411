"""Two ranks, of heads or of layers: merged and reused is only what is within the bound on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.hazards import FIRST
from tests.vllm_plugin.engines import EXACT, LOSSY, Prompt, engine, near_prefix, text

OUT = 8
PATIENCE_S = 600
"""Two ranks that share their cores with others wait for each other."""

BY_KEYS = {"similarity": "key", "key_threshold": 0.8}
PROBED = {"reuse": "probed", "reuse_audit_rate": 1e-9}
WRITTEN = {"directions": "written", "own_norms": True, "candidates": "signature", **BY_KEYS}
STAGES = [pytest.mark.slow, pytest.mark.runs("pipeline stages", *FIRST)]
TWO_CORES = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want two cores")
SCRIPT = '''
import json, os, sys
os.sched_setaffinity(0, range(os.cpu_count()))
from jointkv.vllm_plugin.worker.cpu import JointCPUWorker  # every worker imports what stands outside of functions

class ProfilingWorker(JointCPUWorker):
    """vLLM's runner makes what stages send each other while it profiles, which its CPU worker does to compile alone."""

    def load_model(self, *args, **kwargs):
        super().load_model(*args, **kwargs)
        self.model_runner.profile_run()

def attention(worker):
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    readings = get_kv_transfer_group().worker.readings
    return [(reading.fault, reading.steps, reading.shared_steps) for reading in readings.values()]

def main():
    from vllm import LLM, SamplingParams

    from jointkv.vllm_plugin import engine_args
    from jointkv.vllm_plugin.scheduler import side
    from tests.vllm_plugin.engines import BOLD, WATCHED

    side.ReuseRule = BOLD
    prompts, parallel, options = map(json.loads, sys.argv[2:])
    arguments = engine_args(**WATCHED, **options)
    if "pipeline_parallel_size" in parallel:
        arguments["worker_cls"] = "two_ranks.ProfilingWorker"
    llm = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, num_gpu_blocks_override=200, max_model_len=1024,
        block_size=32, skip_tokenizer_init=True, **parallel, **arguments,
    )
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [one for part in (prompts[:1], prompts[1:]) for one in llm.generate(part, params, use_tqdm=False)]
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    print("FOUND", json.dumps({
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "statistics": scheduler.connector.scheduler.totals(),
        "references": sum(b.ref_cnt for b in scheduler.kv_cache_manager.block_pool.blocks if not b.is_null),
        "attention": llm.collective_rpc(attention),
    }))
    llm.llm_engine.engine_core.shutdown()

if __name__ == "__main__":
    main()
'''


def found(model: Path, folder: Path, prompts: list[Prompt], parallel: dict[str, Any], options: dict[str, Any]) -> Any:
    """What the script says of two ranks that serve the first prompt, and then the others."""
    script = folder / "two_ranks.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    command = [sys.executable, str(script), str(model), *map(json.dumps, (prompts, parallel, options))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stderr[-3000:]]
    said = json.loads(line.removeprefix("FOUND "))
    assert [len(tokens) for tokens in said["tokens"]] == [OUT] * len(prompts)
    assert said["references"] == 0 and said["statistics"]["faults"] == 0 and len(said["attention"]) == 2
    return said


@TWO_CORES
@pytest.mark.timeout(PATIENCE_S + 60)
@pytest.mark.parametrize(
    ("parallel", "options"),
    [
        pytest.param("tensor", {}, id="as they stand", marks=pytest.mark.slow),
        pytest.param("tensor", {"own_norms": True}, id="own norms", marks=pytest.mark.slow),
        pytest.param("tensor", {"candidates": "signature"}, id="signatures", marks=pytest.mark.slow),
        pytest.param(
            "tensor", WRITTEN, id="directions", marks=[pytest.mark.slow, pytest.mark.runs("written directions", *FIRST)]
        ),
        pytest.param("tensor", PROBED, id="reuse", marks=pytest.mark.slow),
        pytest.param("pipeline", {}, id="stages", marks=STAGES),
        pytest.param("pipeline", PROBED, id="stages, reuse", marks=STAGES),
    ],
)
def test_two_ranks_merge(calm: Path, tmp_path: Path, parallel: str, options: dict[str, Any]) -> None:
    said = found(calm, tmp_path, near_prefix(4, shared=320), {f"{parallel}_parallel_size": 2}, options)
    if "reuse" in options:
        assert said["statistics"]["prompt_tokens_skipped"] > 500
    else:
        assert said["statistics"]["blocks_merged"] > 15
    if "directions" in options:  # one for each place of the others, who come together
        merged = said["statistics"]["blocks_merged_by_direction"]
        assert merged == said["statistics"]["blocks_merged"] == 3 * said["statistics"]["directions_written"]
        assert said["statistics"]["pages_freed"] == 2 * said["statistics"]["directions_written"]
    elif "candidates" in options:  # pages of the first request, which has ended, serve nobody
        assert said["statistics"]["blocks_merged_by_signature"] == said["statistics"]["blocks_merged"]
    if "own_norms" in options:
        for ((fault, steps, shared_steps),) in said["attention"]:
            assert fault is None and shared_steps == steps >= OUT


@TWO_CORES
@pytest.mark.slow
@pytest.mark.timeout(PATIENCE_S + 60)
@pytest.mark.parametrize(
    ("attention", "counter"),
    [
        pytest.param("engine", "pages_filled", marks=pytest.mark.runs("text that moved", *FIRST)),
        pytest.param("shared", "blocks_in_place", marks=pytest.mark.runs("text read in place", *FIRST)),
    ],
)
def test_text_that_moved_is_read_on_both_ranks(calm: Path, tmp_path: Path, attention: str, counter: str) -> None:
    """Heads of other lengths before the same text: each rank turns keys, or queries, of its own heads."""
    prompts = [text(16 + head, head) + text(320, 99) + text(20, 50 + head) for head in range(4)]
    with engine(calm) as stock:
        expected = stock.generate(prompts, OUT)
    options = {**PROBED, **LOSSY, "moved": True, "attention": attention}
    said = found(calm, tmp_path, prompts, {"tensor_parallel_size": 2}, options)
    counted = said["statistics"]
    assert counted[counter] >= 3 * 7 and counted["moved_tokens_skipped"] == 32 * counted[counter]
    same = [ours[0] == theirs[0] for ours, theirs in zip(said["tokens"], expected, strict=True)]
    assert said["tokens"][0] == expected[0] and sum(same) >= 3, "what was read is not what a prefill writes"


@TWO_CORES
@pytest.mark.slow
@pytest.mark.timeout(PATIENCE_S + 60)
@pytest.mark.runs("pipeline stages", *FIRST)
def test_bound_zero_changes_no_token_of_two_stages(calm: Path, tmp_path: Path) -> None:
    prompts = [text(150, number // 3) for number in range(9)]
    with engine(calm, enable_prefix_caching=False) as stock:
        expected = stock.generate(prompts, OUT)
    said = found(calm, tmp_path, prompts, {"pipeline_parallel_size": 2, "enable_prefix_caching": False}, EXACT)
    assert said["tokens"] == expected and said["statistics"]["blocks_merged"] > 15
