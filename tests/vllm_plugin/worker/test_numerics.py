"""The engine in every dtype, at its longest prompt and run after run; formats that are not understood are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.exceptions import VLLMValidationError

from jointkv.errors import LayoutError
from jointkv.vllm_plugin.engine.pages import packed_pages
from tests.vllm_plugin.engines import EXACT, engine, near_prefix, text

PAGES, TOKENS = 4, 8

refusal = pytest.mark.hazard(
    "Numerics",
    "the engine keeps its pages in a format that cannot be compared (int8, int4, nvfp4, scales inside the page)",
    "refused by name at the start, before anything is written",
)
repeatable = pytest.mark.hazard(
    "Numerics", "the same requests come again, or on two ranks", "equal tokens and equal merges"
)


def unwritable(*_: Any) -> None:
    raise AssertionError("a page of a format that is not understood was written")


@refusal
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("int8_per_token_head", torch.int8),
        ("int4_per_token_head", torch.uint8),
        ("fp8_per_token_head", torch.uint8),
        ("fp8_per_token_head", torch.float8_e4m3fn),
        ("fp8_ds_mla", torch.uint8),
        ("nvfp4", torch.uint8),
        ("turboquant_k8v4", torch.uint8),
        ("auto", torch.float64),
        ("auto", torch.uint8),
        ("auto", torch.float8_e4m3fnuz),
    ],
)
def test_formats_that_are_not_understood(name: str, dtype: torch.dtype) -> None:
    layer = SimpleNamespace(
        kv_cache_dtype=name,
        kv_cache=torch.zeros(PAGES, 2 * TOKENS * 16).to(dtype),
        impl=SimpleNamespace(do_kv_cache_update=unwritable),
        **{"num_kv_heads": 1, "head_size": 16, "head_size_v": 16, "dtype": torch.float32},
    )
    with pytest.raises(LayoutError, match=f"{name}.*not supported"):
        packed_pages([layer], PAGES, TOKENS)


@refusal
@pytest.mark.skipif(torch.cpu._is_avx512_supported(), reason="this processor has what fp8 pages need")
def test_fp8_without_the_instructions_for_it(calm: Path) -> None:
    with pytest.raises(NotImplementedError, match="FP8"), engine(calm, fusion={}, kv_cache_dtype="fp8"):
        pass


LIMIT = 160


@pytest.mark.hazard(
    "Numerics", "identical requests in fp32, bf16 or fp16, fused at bound 0", "tokens equal to the stock engine's"
)
@pytest.mark.hazard(
    "Numerics", "a prompt as long as the model's context, or one token longer", "answers are those without jointkv"
)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.nightly)])
def test_identical_requests_as_long_as_the_limit(calm: Path, dtype: str, record_property: Any) -> None:
    prompts = [text(LIMIT - 6, number // 3) for number in range(6)]
    options = {"dtype": dtype, "enable_prefix_caching": False, "max_model_len": LIMIT}
    with engine(calm, **options) as stock:
        expected = stock.generate(prompts, 6)
    with engine(calm, fusion=EXACT, **options) as fused:
        assert fused.generate(prompts, 6) == expected
        assert fused.statistics["faults"] == 0 and fused.statistics["blocks_merged"] >= 6
        record_property("merges", fused.statistics["blocks_merged"])
        with pytest.raises(VLLMValidationError, match="maximum context length"):
            fused.submit(text(LIMIT + 1, 0))
        fused.assert_drained()


COUNTS = ("blocks_considered", "blocks_merged", "pages_freed", "rejected", "faults")


@repeatable
def test_two_runs_are_equal(calm: Path, record_property: Any) -> None:
    found = []
    for _ in range(2):
        with engine(calm, pages=40, fusion={}) as fused:
            tokens = fused.generate(near_prefix(6, shared=200), 8)
            found.append((tokens, {name: fused.statistics[name] for name in COUNTS}, fused.preempted, fused.steps))
    assert found[0] == found[1]
    assert found[0][1]["blocks_merged"] > 5 and found[0][1]["faults"] == 0
    record_property("merges", 2 * found[0][1]["blocks_merged"])


SCRIPT = """
import json, os, sys
os.sched_setaffinity(0, range(os.cpu_count()))
from vllm import LLM, SamplingParams
from tests.vllm_plugin.engines import WATCHED, near_prefix
from jointkv.vllm_plugin import engine_args

def main():
    llm = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, num_gpu_blocks_override=200, max_model_len=1024,
        block_size=32, skip_tokenizer_init=True, tensor_parallel_size=int(sys.argv[2]), **engine_args(**WATCHED),
    )
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in near_prefix(4, shared=320)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    statistics = llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler.totals()
    print("FOUND", json.dumps({
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        **{name: statistics[name] for name in sys.argv[3].split(",")},
    }))
    llm.llm_engine.engine_core.shutdown()

if __name__ == "__main__":
    main()
"""


@repeatable
@pytest.mark.nightly
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want two cores")
def test_one_rank_and_two_merge_the_same(calm: Path, tmp_path: Path, record_property: Any) -> None:
    """Every rank compares its own heads; sums of two ranks differ from those of one in the last bits only."""
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    found = []
    for ranks in (1, 2):
        environment = {
            **os.environ,
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks))),
        }
        command = [sys.executable, str(script), str(calm), str(ranks), ",".join(COUNTS)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stderr[-3000:]]
        found.append(json.loads(line.removeprefix("FOUND ")))
    assert found[0] == found[1]
    assert found[0]["blocks_merged"] > 20 and found[0]["faults"] == 0
    record_property("merges", 2 * found[0]["blocks_merged"])
