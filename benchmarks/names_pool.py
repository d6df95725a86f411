"""What the traffic `names` takes of a pool: every text at another position, copied or read in place. Counts, no times.

`.venv-vllm/bin/python benchmarks/names_pool.py --output docs/results/bench`. The model is random and so small that any
block is near enough: these are numbers of the scheduler alone. The first request comes alone, then all others at once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from engines import (
    BLOCK_SIZE,
    MODEL,
    in_a_process_of_its_own,
    prepare_environment,
    scheduler_of,
    tell,
    write_calm_model,
)
from timing import write

REQUESTS, MAX_MODEL_LEN = 24, 2048
PROBED = {"reuse": "probed", "reuse_audit_rate": 1e-9, "max_relative_error": 0.9, "max_token_error": None}
ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "equal positions": PROBED,
    "copied": {**PROBED, "moved": True},
    "in place": {**PROBED, "moved": True, "attention": "shared"},
}


TINY = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": MAX_MODEL_LEN},
    "dtype": "float32",
}
CONTEXT = 0.005
"""What was read before changes K and V next to nothing."""


def serve(folder: Path, arm: str, blocks: int, out: int) -> dict[str, Any]:
    """One round."""
    from transformers import AutoTokenizer
    from vllm import EngineArgs, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from jointkv.evaluate.traffic import get_traffic
    from jointkv.hf.models import fetch_model
    from jointkv.vllm_plugin import engine_args
    from jointkv.vllm_plugin.engine.others import ours

    tokenizer = AutoTokenizer.from_pretrained(str(fetch_model(MODEL)))
    model = write_calm_model(folder, CONTEXT, vocab_size=len(tokenizer), **TINY)
    fusion = ARMS[arm]
    attached = {} if fusion is None else engine_args(min_pool_usage=0.0, **fusion)
    common = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": REQUESTS * 2, "max_num_batched_tokens": MAX_MODEL_LEN}
    memory = {"block_size": BLOCK_SIZE, "num_gpu_blocks_override": blocks, "enforce_eager": True}
    options = {"model": model, "dtype": "float32", "skip_tokenizer_init": True, **common, **memory, **attached}
    engine = LLMEngine.from_engine_args(EngineArgs(**options))
    scheduler = scheduler_of(engine)
    pool, sampling = (
        scheduler.kv_cache_manager.block_pool,
        SamplingParams(temperature=0, max_tokens=out, ignore_eos=True, detokenize=False),
    )
    prompts = [list(request.prompt) for request in get_traffic("names").requests(tokenizer, REQUESTS, seed=0)]
    found = {"arm": arm, "blocks": blocks, "output_tokens": out, "peak_pages": 0, "running": 0, "steps": 0}
    for part in (prompts[:1], prompts[1:]):
        for number, prompt in enumerate(part):
            engine.add_request(f"{len(part)}-{number}", {"prompt_token_ids": prompt}, sampling)
        found |= {"peak_pages": 0, "running": 0, "steps": 0}
        while engine.has_unfinished_requests():
            engine.step()
            found["steps"] += 1
            found["running"] = max(found["running"], len(scheduler.running))
            found["peak_pages"] = max(found["peak_pages"], pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
    connector = ours(scheduler.connector)
    counted = {} if connector is None else connector.scheduler.totals()
    names = ("prompt_tokens_skipped", "moved_tokens_skipped", "pages_filled", "blocks_in_place", "faults")
    found |= {name: counted.get(name, 0) for name in names}
    return {**found, "prompt_tokens": sum(map(len, prompts))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[200])
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    parser.add_argument("--serve", metavar="ARM", help="one round alone; used by the script itself")
    arguments = parser.parse_args()
    if arguments.serve is not None:
        prepare_environment(2**30)
        with tempfile.TemporaryDirectory() as folder:
            tell(serve(Path(folder), arguments.serve, arguments.blocks[0], arguments.output_tokens))
    rows = []
    for blocks in arguments.blocks:
        for arm in ARMS:
            asked = ["--serve", arm, "--blocks", str(blocks), "--output-tokens", str(arguments.output_tokens)]
            rows.append(in_a_process_of_its_own(__file__, *asked))
            print(rows[-1], file=sys.stderr, flush=True)
    headline = {f"{row['arm']}, {row['blocks']}": [row["running"], row["peak_pages"], row["steps"]] for row in rows}
    write(arguments.output, "names_pool", {"headline": headline, "requests": REQUESTS, "rows": rows})


if __name__ == "__main__":
    main()
