"""Two engines behind one front end: each shares what is its own, and metrics tell them apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.hazards import FIRST
from tests.vllm_plugin.engines import engine, text

OUT = 8
PROMPTS = [text(98, number) for number in range(4)]
SCRIPT = """
import asyncio, json, sys

from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from jointkv.vllm_plugin import engine_args
from tests.vllm_plugin.engines import EXACT, WATCHED
from tests.vllm_plugin.test_data_parallel import OUT, PROMPTS


def merged():
    names = ("jointkv_blocks_merged_total", "jointkv_faults_total")
    samples = [one for metric in REGISTRY.collect() for one in metric.samples if one.name in names]
    return {name: {one.labels["engine"]: one.value for one in samples if one.name == name} for name in names}


async def main():
    served = AsyncLLM.from_engine_args(AsyncEngineArgs(
        sys.argv[1], data_parallel_size=2, dtype="float32", enforce_eager=True, num_gpu_blocks_override=60,
        max_model_len=512, block_size=32, skip_tokenizer_init=True, enable_prefix_caching=False,
        gpu_memory_utilization=0.2, **engine_args(**WATCHED, **EXACT),
    ))
    params = SamplingParams(max_tokens=OUT, temperature=0, ignore_eos=True, detokenize=False)

    async def answer(name, prompt, rank):
        async for output in served.generate({"prompt_token_ids": prompt}, params, name, data_parallel_rank=rank):
            pass
        return list(output.outputs[0].token_ids)

    async def together(name, prompts, rank):
        return await asyncio.gather(*(answer(f"{name}-{at}", one, rank) for at, one in enumerate(prompts)))

    found = {"apart": await asyncio.gather(*(together(f"apart-{rank}", PROMPTS, rank) for rank in (0, 1)))}
    found["merged apart"] = merged()
    found["twice"] = await together("twice", [*PROMPTS, *PROMPTS], 1)
    found["merged twice"] = merged()
    print("FOUND", json.dumps(found), flush=True)
    served.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
"""


PATIENCE_S = 600
"""Two engines that share their cores with others take long to start."""


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE_S + 60)
@pytest.mark.runs("data parallel", *FIRST)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two engines want two cores")
def test_each_engine_shares_what_is_its_own(calm: Path, tmp_path: Path) -> None:
    with engine(calm, 60, max_model_len=512, enable_prefix_caching=False) as stock:
        expected = stock.generate(PROMPTS, OUT)
    script = tmp_path / "data_parallel.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    done = subprocess.run(
        [sys.executable, script, calm], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stderr[-3000:]]
    found = json.loads(line.removeprefix("FOUND "))
    assert found["apart"] == [expected, expected] and found["twice"] == [*expected, *expected]
    merged, faults = "jointkv_blocks_merged_total", "jointkv_faults_total"
    assert found["merged apart"][merged] == {"0": 0, "1": 0}, "the same text in two engines is nothing to share"
    assert found["merged twice"][merged]["0"] == 0 and found["merged twice"][merged]["1"] >= 3 * len(PROMPTS)
    assert found["merged twice"][faults] == {"0": 0, "1": 0}
