"""What the scheduler's side costs as requests, resident blocks, waiting requests and copies of a text become many.

Run it in the environment with vLLM: `.venv-vllm/bin/python benchmarks/scaling.py --output docs/results/bench`, half an
hour and 4 GB; `--small` tries it in minutes. The scheduler is vLLM's own, the plugin's side the real one, see
`scaling_engine.py`; every arm of every part has a process of its own, and seconds are processor time. Growth is the
slope of the logarithm of seconds over that of the size: 0 does not grow, 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engines import in_a_process_of_its_own, prepare_environment, tell
from timing import write

BLOCKS, HEADER, HELD = 100, 2, 20
"""Of a request: 1,600 tokens, the first of which nobody else has; of one that only runs 320."""

SEATS, ASKED, ANSWER = 64, 128, 8
"""Running requests, requests that are measured, and tokens of each answer, where nothing else is said."""

SIZES = {
    "residents": [10_000, 31_600, 100_000, 316_000, 1_000_000],
    "running": [10, 100, 1_000, 10_000],
    "waiting": [10, 100, 1_000, 10_000],
    "copies": [10, 100, 1_000, 10_000],
    "room": [60, 120, 250, 500, 1_000],
}
MOST = {"moved": 316_000}
"""Sizes that an arm goes up to: every page that may be read elsewhere has two windows in a table of their own."""

SMALL = {"residents": [2_000, 8_000], "running": [10, 40], "waiting": [100, 400], "copies": [10, 40], "room": [60, 120]}
ARMS_OF = {
    "copies": ["fusion", "reuse"],
    "waiting": ["stock", "reuse"],
    "residents": ["stock", "reuse", "moved"],
    "running": ["stock", "reuse"],
    "room": ["stock", "reuse", "moved"],
}

EIGHT_GPUS = {"tokens_per_s": 20_000, "requests_per_s": 20}
"""An engine to extrapolate to, a guess on the high side: answers of 1,000 tokens to prompts of 1,600."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=SIZES, action="append", help="may be repeated; all by default")
    parser.add_argument("--small", action="store_true", help="small sizes, to try it")
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder for scaling.json")
    parser.add_argument("--point", nargs=2, metavar=("PART", "ARM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = SMALL if arguments.small else SIZES
    if arguments.point:
        prepare_environment(2**30)
        part, arm = arguments.point
        with tempfile.TemporaryDirectory() as folder:
            most = MOST.get(arm, max(sizes[part]))
            rows = list(PARTS[part](Path(folder), arm, [size for size in sizes[part] if size <= most]))
        tell(rows)
    path = arguments.output / "scaling.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for part in arguments.part or ARMS_OF:
        rows = [row for row in rows if row["part"] != part]
        for arm in ARMS_OF[part]:
            small = ["--small"] if arguments.small else []
            found = in_a_process_of_its_own(__file__, "--point", part, arm, *small)
            rows += [{"part": part, "arm": arm, **row} for row in found]
            print(
                f"{part}, {arm}: {[round(1e3 * row['seconds'] / row['requests'], 2) for row in found]} ms", flush=True
            )
            write(arguments.output, "scaling", summary(rows))


def residents(folder: Path, arm: str, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Requests among so many resident blocks; half of the text is resident behind another header."""
    from scaling_engine import Engine, resident_bytes

    engine = Engine(folder, arm, max(sizes) + 4 * ASKED * BLOCKS * len(sizes), SEATS)
    held, before, text = 0, resident_bytes(), 0
    for size in sizes:
        while held < size:
            engine.submit(prompt(10**6 + text, text), 1)
            engine.drain(lambda: len(engine.scheduler.waiting) < SEATS)
            held, text = held + BLOCKS, text + 1
        engine.drain()
        engine.take()
        filled = resident_bytes()
        for number in range(ASKED):
            known = int(np.random.default_rng(number).integers(text)) if number % 2 else 10**7 + size + number
            engine.submit(prompt(2 * 10**6 + size + number, known), ANSWER)
        engine.drain()
        held += ASKED * BLOCKS
        yield {"size": size, "bytes": filled - before, "resident": engine.resident, **told(engine, ASKED)}


def running(folder: Path, arm: str, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """So many requests at once, each holding 20 blocks of its own, in steps that compute a token of each."""
    from scaling_engine import BLOCK_SIZE, Engine

    most = max(sizes)
    engine = Engine(folder, arm, 2 * HELD * most, most, 16_384)
    for size in sizes:
        while len(engine.scheduler.requests) < size:
            number = len(engine.scheduler.requests)
            engine.submit(prompt(10**6 + number, number, HELD), 10**4)
        engine.drain(lambda: all(one.num_output_tokens for one in engine.scheduler.requests.values()))
        engine.take()
        for _ in range(2 * BLOCK_SIZE):  # each fills two blocks
            engine.step()
        yield {"size": size, **told(engine, size)}


def waiting(folder: Path, arm: str, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """So many requests wait while others run, end and start; half of the text is resident."""
    from scaling_engine import Engine

    for size in sizes:
        engine = Engine(folder, arm, 2 * SEATS * BLOCKS + 100 * BLOCKS, SEATS)
        for text in range(100):
            engine.submit(prompt(10**6 + text, text), 1)
        engine.drain()
        for number in range(size + ASKED):
            engine.submit(prompt(2 * 10**6 + number, number % 100 if number % 2 else 10**7 + number), ANSWER)
        engine.take()
        line = engine.scheduler
        engine.drain(lambda line=line, size=size: len(line.waiting) <= size)
        yield {"size": size, **told(engine, ASKED)}


def copies(folder: Path, arm: str, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Requests for a text of 20 blocks of which there are so many copies resident, none of which may serve."""
    from scaling_engine import Engine

    engine, text = Engine(folder, arm, 25 * (max(sizes) + ASKED * len(sizes)), SEATS, error=9.0), 0
    for size in sizes:
        for _ in range(text, size):
            engine.submit(prompt(10**6 + text, 0, 20), 1)
            text += 1
        engine.drain()
        engine.take()
        for _ in range(ASKED):
            engine.submit(prompt(10**6 + text, 0, 20), ANSWER)
            text += 1
        engine.drain()
        yield {"size": size, **told(engine, ASKED)}


def room(folder: Path, arm: str, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Steps of eight requests, while ten of so many blocks each, which nobody else has, wait for pages."""
    from scaling_engine import BLOCK_SIZE, Engine

    running, steps = 8, 4 * BLOCK_SIZE  # each of which fills four more blocks
    for size in sizes:
        engine = Engine(folder, arm, running * (HELD + 1) + size - 1, SEATS)
        for number in range(running):
            engine.submit(prompt(10**6 + number, number, HELD), 10**4)
        engine.drain(lambda engine=engine: all(one.num_output_tokens for one in engine.scheduler.requests.values()))
        for number in range(10):
            engine.submit(prompt(2 * 10**6 + number, 10**6 + number, size), 1)
        engine.take()
        for _ in range(steps):
            engine.step()
        assert len(engine.scheduler.waiting) == 10, "one of them has found room"
        yield {"size": size, **told(engine, steps)}


PARTS = {"residents": residents, "running": running, "waiting": waiting, "copies": copies, "room": room}


def prompt(header: int, text: int, blocks: int = BLOCKS) -> list[int]:
    """A text behind a header of its own."""
    from scaling_engine import random_text

    return random_text(header, HEADER) + random_text(10**8 + text, blocks - HEADER)


def told(engine: Any, requests: int) -> dict[str, Any]:
    """What the steps since the last call have cost, by request and by step."""
    spent, counted = engine.take()
    steps = len(spent.seconds)
    return {
        "requests": requests,
        "steps": steps,
        "tokens": spent.tokens,
        "seconds_per_step": sum(spent.seconds) / steps,
        "median_step": median(spent.seconds),
        "longest_step": max(spent.seconds),
        "seconds": sum(spent.seconds),
        "plugin_seconds": counted["schedule_seconds"],
        "plan_seconds": counted["reuse_plan_seconds"],
        "blocks": counted["blocks_considered"],
        "tokens_skipped": counted["prompt_tokens_skipped"],
        "merged": counted["blocks_merged"],
        "pairs": spent.pairs,
        "message_bytes_per_step": (spent.inquiry_bytes + spent.verdict_bytes) / steps,
        "message_seconds_per_step": spent.message_seconds / steps,
        "longest_pause": max(spent.pauses, default=0.0),
        "pause_seconds": sum(spent.pauses),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth by part and arm, memory per resident block, and what an engine of eight GPUs would spend."""
    growth = {
        f"{part}, {arm}": round(slope([row["size"] for row in found], [cost(row) for row in found]), 3)
        for part, arms in ARMS_OF.items()
        for arm in arms
        if len(found := of(rows, part, arm)) > 1
    }
    memory = {
        arm: bytes_per_block(found) for arm in ARMS_OF["residents"] if len(found := of(rows, "residents", arm)) > 1
    }
    headline = {"growth": growth, "bytes_per_resident_block": memory}
    if all(of(rows, part, arm) for part in ("residents", "running") for arm in ("stock", "reuse")):
        headline["eight_gpus"] = {"load": EIGHT_GPUS, **{arm: busy(rows, arm) for arm in ("stock", "reuse")}}
    return {"headline": headline, "rows": rows}


def of(rows: list[dict[str, Any]], part: str, arm: str) -> list[dict[str, Any]]:
    """Those of one part and arm, by size."""
    return sorted((row for row in rows if (row["part"], row["arm"]) == (part, arm)), key=lambda row: row["size"])


def cost(row: dict[str, Any]) -> float:
    """Seconds that should not grow: of a request, and where the requests are what grows, of a token of each."""
    return float(row["seconds"] / (row["tokens"] if row["part"] == "running" else row["requests"]))


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Of the logarithms: 0 does not grow, 1 is linear."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def bytes_per_block(found: list[dict[str, Any]]) -> int:
    """Memory of the process between the smallest and the largest size; without the plugin it is vLLM's own."""
    first, last = found[0], found[-1]
    return round((last["bytes"] - first["bytes"]) / (last["size"] - first["size"]))


def busy(rows: list[dict[str, Any]], arm: str) -> float:
    """The part of a core that the scheduler takes: a share for every token, and one for every request's prompt."""
    token = cost(of(rows, "running", arm)[-1])
    request = cost(of(rows, "residents", arm)[-1])
    return round(EIGHT_GPUS["tokens_per_s"] * token + EIGHT_GPUS["requests_per_s"] * request, 3)


if __name__ == "__main__":
    main()
