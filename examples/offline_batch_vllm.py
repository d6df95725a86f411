"""A batch of requests in vLLM, offline, whose pages are shared although their first lines differ.

    python examples/offline_batch_vllm.py [MODEL]

Needs vLLM: `make setup-vllm`, then `.venv-vllm/bin/python`.
"""

import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, so that its metrics are here
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, on a CPU

REPORT = (
    "The town's museum of clocks counted 12,400 visitors last year, a third more than the year before. Most came in "
    "spring, when the great clock of 1530 was shown running. The shop sold 900 books and 3,000 cards. The roof over "
    "the east wing must be mended before winter; two offers are in, the cheaper from a firm in the next village. "
)
QUESTIONS = ("How many visitors came?", "What must be mended?", "When was the clock made?", "How many books were sold?")


def main(model: str | None = None, **options: object) -> float:
    """Answer the questions; returns how many blocks were merged."""
    from prometheus_client import REGISTRY
    from vllm import LLM, SamplingParams

    from jointkv.vllm_plugin import engine_args

    if model is None:
        from jointkv.hf.models import fetch_model

        model = str(fetch_model("smollm2"))
    given = {"max_model_len": 512, "block_size": 32, "num_gpu_blocks_override": 64, "dtype": "float32"}
    llm = LLM(model, enforce_eager=True, disable_log_stats=False, **given, **engine_args(min_pool_usage=0.0, **options))
    prompts = [f"Request {4711 + 97 * n}.\n{REPORT}\nQuestion: {q}\nAnswer:" for n, q in enumerate(QUESTIONS)]
    for answer in llm.generate(prompts, SamplingParams(max_tokens=16, temperature=0), use_tqdm=False):
        print(repr(answer.outputs[0].text.strip()))
    counted = (sample for family in REGISTRY.collect() for sample in family.samples)  # what a server has in /metrics
    merged = sum(sample.value for sample in counted if sample.name == "jointkv_blocks_merged_total")
    print(f"{merged:g} blocks given back to the pool")
    return merged


if __name__ == "__main__":
    main(*sys.argv[1:2])
