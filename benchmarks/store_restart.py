"""Time to the first token of a stored prompt after a restart of vLLM, and of computing it, in turns.

`python benchmarks/store_restart.py --output docs/results/bench`; a new process with a new engine for every number.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import engines
from timing import write

CONTEXT, OUT, SETTLE = 8192, 16, 64
"""Longest context, tokens that are answered, and tokens of a first request that is not measured.

That one is stored and loaded like the other, and counted in `tokens_loaded`.
"""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of one engine: seconds to the first token by the clock on the wall and of the processor, and what was loaded."""
    engines.prepare_environment(2 << 30)
    from vllm import SamplingParams

    from jointkv.evaluate.traffic.long_documents import LongDocuments
    from jointkv.hf.models import fetch_model, load_tokenizer
    from jointkv.vllm_plugin import engine_args

    fetch_model(engines.MODEL)
    novel = LongDocuments(tokens=arguments.tokens, kinds=("novel",))
    (request,) = novel.requests(load_tokenizer(engines.MODEL), 1, continuation_tokens=1, seed=0)
    prompt = list(request.prompt)
    attached = {} if arguments.store is None else engine_args(enabled=False, store=str(arguments.store))
    engine = engines.build(arguments.dtype, 8, CONTEXT // engines.BLOCK_SIZE + 8, max_model_len=CONTEXT, **attached)

    def answer(name: str, tokens: list[int]) -> tuple[float, float, list[int]]:
        params = SamplingParams(max_tokens=OUT, temperature=0, ignore_eos=True, detokenize=False)
        start, spent, first, last = time.perf_counter(), time.process_time(), None, []
        engine.add_request(name, {"prompt_token_ids": tokens}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                last = list(output.outputs[0].token_ids)
                if first is None and last:
                    first = time.perf_counter() - start, time.process_time() - spent
        assert first is not None
        return (*first, last)

    answer("first", prompt[-SETTLE:])
    wall, processor, said = answer("measured", prompt)
    found: dict[str, Any] = {"wall_s": wall, "processor_s": processor, "tokens": len(prompt), "answer": said}
    if arguments.store is not None:
        connector = engines.scheduler_of(engine).connector
        found["loaded"] = connector.scheduler.totals()["store_tokens_loaded"]
    engine.engine_core.shutdown()  # which writes what waits
    return found


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fill a store, then compute and load in turns."""
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))

    def engine(store: bool) -> dict[str, Any]:
        given = ["--child", "--tokens", str(arguments.tokens), "--dtype", arguments.dtype]
        more = ["--store", str(folder / "pages")] if store else []
        return dict(engines.in_a_process_of_its_own(__file__, *given, *more))

    try:
        written = engine(store=True)
        nbytes = sum(file.stat().st_size for file in (folder / "pages" / "segments").iterdir())
        runs = [(engine(store=False), engine(store=True)) for _ in range(arguments.repeats)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    computed, loaded = ([pair[side] for pair in runs] for side in (0, 1))
    least = (arguments.tokens - 1) // engines.BLOCK_SIZE * engines.BLOCK_SIZE
    if any(run["loaded"] < least for run in loaded) or written["loaded"]:
        raise SystemExit("a prompt was not loaded, or one that was not stored")
    rows = {
        f"{name}_{clock}_s": [round(run[f"{clock}_s"], 3) for run in side]
        for name, side in (("computed", computed), ("restarted", loaded))
        for clock in ("wall", "processor")
    }
    of_computing = {
        clock: round(median(rows[f"restarted_{clock}_s"]) / median(rows[f"computed_{clock}_s"]), 4)
        for clock in ("wall", "processor")
    }
    return {
        "headline": {"of_computing": of_computing, "tokens": written["tokens"]},
        "model": engines.MODEL,
        "dtype": arguments.dtype,
        "block_size": engines.BLOCK_SIZE,
        "tokens": written["tokens"],
        "tokens_loaded": loaded[0]["loaded"],
        "stored_bytes_per_token": round(nbytes / written["tokens"], 1),
        "first_engine_wall_s": round(written["wall_s"], 3),
        "answers_equal": all(run["answer"] == written["answer"] for run in (*computed, *loaded)),
        **rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the store is made; default: the system's temporary folder")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        engines.tell(measure(arguments))
    write(arguments.output, "store_restart", compare(arguments))


if __name__ == "__main__":
    sys.exit(main())
