"""What signatures of blocks cost in a serving engine: bytes of messages, seconds of a search, share of a step.

Run it in the environment with vLLM: `.venv-vllm/bin/python benchmarks/signature_search.py --output docs/results/bench`.
A search is a product of a matrix and a vector, so its floor is the bytes of the matrix over the measured bandwidth of a
copy. The engine part serves unrelated text, of which nothing can be shared within a bound, and text that is the same
but for its first lines: with candidates by tokens, by both, and under the paper's policy. With `--waves` more unrelated
text comes before it, of which fewer blocks are signed once nothing has been found for long.
"""

from __future__ import annotations

import argparse
import gc
import pickle
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engines import BLOCK_SIZE, build, corpus, in_a_process_of_its_own, prepare_environment, scheduler_of, tell
from jointkv.fusion.signature_index import FIRST, SignatureIndex
from timing import machine_speed, write

RESIDENT = (1_000, 10_000, 100_000)
SIZES = (32, 64)
OTHERS_BYTES = 64 << 20
"""Of the buckets that are searched in between, so that none is found in the second-level cache."""
NEAR = 0.16
"""Squared distance at which pairs are compared under a bound of 0.2."""
PROMPT, OUT = 256, 16
SETTLED = 4
"""Steps after the last prefill, in which what it has filled is compared."""
LAYER_GROUPS = 15
SECONDS = ("sign_seconds", "search_seconds", "compare_seconds", "schedule_seconds", "apply_seconds")
COUNTS = ("blocks_considered", "blocks_signed", "blocks_searched", "blocks_merged", "blocks_merged_by_signature")
PAPER = {"policy": "paper", "accept_unbounded": True, "layer_groups": LAYER_GROUPS}
ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "tokens": {"candidates": "tokens"},
    "both": {"candidates": "both"},
    "paper 0.9": {**PAPER, "key_threshold": 0.9},
    "paper 0.75": {**PAPER, "key_threshold": 0.75},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=16, help="that arrive together, of each kind of text")
    parser.add_argument("--waves", type=int, default=1, help="of unrelated text, one after the other")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all arms")
    parser.add_argument("--searches", type=int, default=200, help="that are timed, of each size of bucket")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    prepare_environment(2 << 30)
    if arguments.one:
        tell(run(arguments.one, arguments.requests, arguments.waves, arguments.turn))
    speed = machine_speed(clock="processor")
    searches = [search(count, size, arguments.searches, speed) for size in SIZES for count in RESIDENT]
    turns = [(arm, turn) for turn in range(arguments.repeats) for arm in arguments.arms]
    sizes = "--requests", str(arguments.requests), "--waves", str(arguments.waves)
    served = [
        row
        for arm, turn in turns
        for row in in_a_process_of_its_own(__file__, "--one", arm, *sizes, "--turn", str(turn))
    ]
    result = {
        "prompt_tokens": PROMPT,
        "answer_tokens": OUT,
        "block_size": BLOCK_SIZE,
        "measured_speed": speed,
        "messages": [message_bytes(size) for size in SIZES],
        "searches": searches,
        "engines": served,
        "headline": {
            **{f"ms_{row['size']}_numbers_{row['resident']}": round(row["ms_in_turn"], 4) for row in searches},
            **{
                f"{row['text']}, {row['arm']}, {row['turn']}.{row['wave']}": round(row["tokens_per_s"], 1)
                for row in served
            },
        },
    }
    write(arguments.output, "signature_search", result)


def message_bytes(size: int, blocks: int = 64) -> dict[str, Any]:
    """Bytes that one block more adds to an inquiry and to a verdict, as they are sent between processes."""
    from jointkv.vllm_plugin.messages import Inquiry, Verdict

    def inquiry(count: int) -> Inquiry:
        return Inquiry(1, sign_group=np.zeros(count, np.int64), sign=np.zeros(count, np.int64))

    def verdict(count: int) -> Verdict:
        return Verdict(1, *np.zeros((5, 0), np.float32), signatures=np.zeros((count, size), np.float16))

    added = {
        name: (len(pickle.dumps(made(2 * blocks))) - len(pickle.dumps(made(blocks)))) / blocks
        for name, made in (("inquiry", inquiry), ("verdict", verdict))
    }
    return {"size": size, "bytes_per_block_and_group": added}


def search(count: int, size: int, repeats: int, speed: dict[str, float]) -> dict[str, Any]:
    """Milliseconds of a look-up among `count` pages of one position: again and again in one, and in many in turn.

    Of processor time, which leaves out what others on the machine take away.
    """
    draw = np.random.default_rng(count)
    buckets = max(2, OTHERS_BYTES // (4 * count * size))
    index = SignatureIndex(size)
    for bucket in range(buckets):
        rows = draw.standard_normal((count, size), np.float32) * np.float32(size**-0.5)
        for number, row in enumerate(rows):
            index.add([bucket], bucket * count + number, row)
    queries = draw.standard_normal((repeats, size), np.float32) * np.float32(size**-0.5)

    def timed(order: Sequence[int]) -> list[float]:
        seconds = []
        for bucket, query in zip(order, queries, strict=True):
            start = time.process_time()
            next(index.near([bucket], query, NEAR), None)
            seconds.append(time.process_time() - start)
        return seconds

    gc.collect()
    again, in_turn = timed([0] * repeats), timed([number % buckets for number in range(repeats)])
    matrix = 4 * count * (FIRST + 1)
    return {
        "resident": count,
        "size": size,
        "ms_again": 1e3 * median(again),
        "ms_in_turn": 1e3 * median(in_turn),
        "ms_in_turn_least": 1e3 * min(in_turn),
        "ms_floor": 1e3 * matrix / speed["copy_bytes_per_s"],
        "bytes_per_page": index.nbytes / len(index),
        "searches": repeats,
    }


def run(arm: str, requests: int, waves: int, turn: int) -> list[dict[str, Any]]:
    """One engine; `turn` chooses the text."""
    from jointkv.vllm_plugin import engine_args

    options = ARMS[arm]
    groups = 1 if options is None else options.get("layer_groups", 1)
    attached = {} if options is None else engine_args(min_pool_usage=0.0, **options)
    pages = groups * requests * (-(-(PROMPT + OUT) // BLOCK_SIZE) + 1)
    engine = build("float32", requests, 1 + pages, max_model_len=PROMPT + OUT, **attached)
    text = corpus(engine.get_tokenizer())
    rows = []
    for kind, of_waves in texts(text, requests, waves, turn).items():
        for wave, prompts in enumerate(of_waves):
            rows.append({"arm": arm, "text": kind, "turn": turn, "wave": wave, **serve(engine, prompts, groups)})
        engine.reset_prefix_cache()
    return rows


def texts(text: Sequence[int], requests: int, waves: int, turn: int) -> dict[str, list[list[list[int]]]]:
    """Prompts cut from one long text: waves that are all different, and one that is the same but for first blocks."""
    draw = random.Random(turn)
    starts = [PROMPT * place for place in draw.sample(range(len(text) // PROMPT), waves * requests + 1)]
    *own, shared = [list(text[start : start + PROMPT]) for start in starts]
    unrelated = [own[first : first + requests] for first in range(0, len(own), requests)]
    return {"unrelated": unrelated, "near-prefix": [[each[:BLOCK_SIZE] + shared[BLOCK_SIZE:] for each in unrelated[0]]]}


def serve(engine: Any, prompts: Sequence[list[int]], groups: int) -> dict[str, Any]:
    """All at once, to their last token."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=OUT, ignore_eos=True, detokenize=False)
    scheduler = scheduler_of(engine)
    side = None if scheduler.connector is None else scheduler.connector.scheduler
    before = {} if side is None else side.totals()
    pool, peak, after_prefill, start = scheduler.kv_cache_manager.block_pool, 0, [], time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{start}-{number}", {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        engine.step()
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        peak = max(peak, used)
        if all(request.num_output_tokens for request in scheduler.requests.values()):
            after_prefill.append(used)
    wall = time.perf_counter() - start
    row = {
        "seconds": wall,
        "tokens_per_s": len(prompts) * OUT / wall,
        "pages_peak": peak / groups,
        "pages_after_prefill": min(after_prefill[:SETTLED]) / groups,
    }
    if side is not None:
        total = side.totals()
        row |= {name: total[name] - before[name] for name in (*COUNTS, *SECONDS)}
        row |= {f"share_{name}": row[name] / wall for name in SECONDS}
    return row


if __name__ == "__main__":
    main()
