"""How long `jointkv advise` takes on requests of some 4,000 tokens, on one core, and how much memory.

Two logs: agents behind a number, with tools and a history of which no two sessions have a line in common; and texts
that share nothing, the most there can be to tokenize; time grows with their number.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from jointkv.evaluate.advise.run import Settings, advise
from jointkv.evaluate.samples import packaged
from jointkv.evaluate.traffic.tool_dialogues import load_tools
from jointkv.hf.models import load_tokenizer
from timing import write

MODEL, TURNS, AT_ONCE = "smollm2", 11, 40
WORDS_OF_A_TURN, WORDS_OF_A_TEXT = 220, 3000


def novel() -> list[str]:
    return packaged("novel_sample.txt").read_text(encoding="utf-8").split()


def said(rng: random.Random, words: list[str], count: int) -> str:
    """Consecutive words of the novel with some of other places in between, in lines."""
    start = rng.randrange(len(words) - count)
    made = [rng.choice(words) if rng.random() < 0.1 else word for word in words[start : start + count]]
    return "\n".join(" ".join(made[at : at + 14]) for at in range(0, count, 14))


def agents(requests: int) -> Iterator[dict[str, Any]]:
    """Sessions of `TURNS` turns, `AT_ONCE` of them interleaved."""
    rng, words = random.Random(0), novel()
    tools = "\n".join(json.dumps(tool) for tool in load_tools().values())
    sessions: list[list[str]] = [[] for _ in range(AT_ONCE)]
    for number in range(requests):
        history = sessions[number % AT_ONCE]
        if len(history) >= TURNS:
            history.clear()
        history.append(said(rng, words, WORDS_OF_A_TURN))
        system = f"Request {rng.randrange(10**11, 10**12)}\nYou are an assistant with tools.\n{tools}"
        messages = [{"role": "system", "content": system}]
        messages += [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(history)]
        messages.append({"role": "user", "content": "Go on."})
        yield {"messages": messages, "max_tokens": 64}


def unrelated(requests: int) -> Iterator[dict[str, Any]]:
    rng, words = random.Random(1), novel()
    for _ in range(requests):
        yield {"prompt": "\n".join(said(rng, words, WORDS_OF_A_TEXT // 10) for _ in range(10))}


ONE_CORE = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
LOGS = {"agents": agents, "unrelated": unrelated}


def measure(log: str, requests: int) -> dict[str, Any]:
    """One reading, in this process."""
    tokenizer = load_tokenizer(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{log}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in LOGS[log](requests))
        megabytes = path.stat().st_size / 1e6
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wall, processor = time.perf_counter(), time.process_time()
        found = advise(path, MODEL, tokenizer, Settings(), lambda done: None)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {
        "log": log,
        "requests": found.requests,
        "tokens": found.tokens,
        "log_megabytes": round(megabytes, 1),
        "seconds": round(wall, 1),
        "processor_seconds": round(processor, 1),
        "tokens_per_s": round(found.tokens / wall),
        "more_memory_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
        "exact_share": round(found.share(found.exact_tokens), 4),
        "same_share": round(found.share(found.same_tokens), 4),
        "moved_share": round(found.share(found.moved_tokens), 4),
        "breaks": [
            {"says": row.says, "token": row.token, "gain_share": round(row.gain_share, 4)} for row in found.breaks
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--unrelated", type=int, default=2_000, help="requests of the log that shares nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    parser.add_argument("--log", choices=LOGS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.log:
        print(json.dumps(measure(given.log, given.requests)))
        return
    rows = []
    for log in LOGS:
        for _ in range(given.repeats):  # each in a process of its own, so that its memory is its own
            requests = given.requests if log == "agents" else given.unrelated
            command = [sys.executable, __file__, "--log", log, "--requests", str(requests)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | ONE_CORE)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(done.stdout.splitlines()[-1], flush=True)
    headline = {
        f"{log}_processor_seconds": median(row["processor_seconds"] for row in rows if row["log"] == log)
        for log in LOGS
    }
    write(given.output, "advise", {"headline": headline, "model": MODEL, "runs": rows})


if __name__ == "__main__":
    main()
