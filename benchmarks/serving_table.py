"""The serving table: every traffic by stock vLLM, with fusion, with reuse, and in a large pool, closed and Poisson.

Run it in the environment with vLLM and leave the machine alone meanwhile: `.venv-vllm/bin/python
benchmarks/serving_table.py`, five to ten minutes per traffic with SmolLM2 on two cores. First a stock server says how
many requests per second it answers in a closed loop; then `jointkv bench serve` compares the arms in that loop and
under Poisson arrivals at that rate. The pool holds a quarter of what all requests need at once. Finished runs are not
repeated: the same command goes on where it stopped. `--requests 4 --output-tokens 8` tries it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jointkv.bench.arms import LARGE_POOL
from jointkv.bench.options import BLOCK_SIZE
from jointkv.bench.requests import Limits, ServingRequest, from_traffic
from jointkv.bench.result import ServingResult
from jointkv.bench.run_folder import RESULT
from jointkv.evaluate.traffic import traffic_names
from jointkv.system.files import replace_text

STILL, MOVED = "probed=reuse reuse=probed", "moved=reuse reuse=probed moved=true"
"""Reuse without a licence, which takes more requests to earn than are served here; the second also of moved text."""
MOVING = frozenset(
    {
        *("names", "shuffled_examples", "tools_reordered", "agent_turns_tools", "agent_turns_thoughts"),
        *("edited_document", "retrieval"),
    }
)
"""Traffics whose common text stands at another position in every request."""
LEFT_OUT = frozenset({"random_tokens", "agent_turns_many", "agent_turns_nonce_many"})
"""Prompts that mean nothing, nor do their answers (what shares nothing is there as `unrelated`), and the same agents
with more tools."""
FEWER = {"long_documents": 6}
"""Requests of traffics whose prompts are long."""
POOL_SHARE = 4
"""All requests together need this many times the pool."""
INTERRUPTED = 130


def main() -> None:
    table = [name for name in traffic_names() if name not in LEFT_OUT]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traffic", action="append", choices=table, help="may be repeated; default all")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=12, help="of each traffic, at most")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1, help="rounds")
    parser.add_argument("--output", type=Path, default=Path("out/table"), help="folder for TRAFFIC.json and the runs")
    arguments = parser.parse_args()
    failed = [traffic for traffic in arguments.traffic or table if not compare(traffic, arguments)]
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}; the same command goes on with them")


def compare(traffic: str, given: argparse.Namespace) -> bool:
    """All arms and loads of one traffic, into a folder and a file of its name; whether they were finished."""
    folder, requests = given.output / traffic, min(given.requests, FEWER.get(traffic, given.requests))
    work = from_traffic(
        traffic, _tokenizer(given.model), requests, given.output_tokens, 0, Limits(None, sys.maxsize, 1)
    )
    same = ["--model", given.model, "--traffic", traffic, "--requests", str(requests), "--dtype", "float32"]
    same += ["--output-tokens", str(given.output_tokens), "--pool-blocks", str(pool_blocks(work.requests))]
    same += ["--concurrency", str(requests)]
    capacity = served([*same, "--repeats", "1", "--arm", "stock"], folder / "capacity")
    if capacity is None:
        return False
    rate = f"{capacity.runs[0].requests_per_s:.2g}"
    arms = ["stock", "fused", MOVED if traffic in MOVING else STILL, LARGE_POOL]
    chosen = [word for arm in arms for word in ("--arm", arm)]
    result = served([*same, "--rate", rate, "--repeats", str(given.repeats), *chosen], folder)
    if result is None:
        return False
    replace_text(given.output / f"{traffic}.json", result.model_dump_json() + "\n")
    return True


def pool_blocks(requests: Sequence[ServingRequest]) -> int:
    """Blocks of a pool that is short of memory, and yet holds the longest request; vLLM keeps one for itself."""
    pages = [-(-request.tokens // BLOCK_SIZE) for request in requests]
    return max(sum(pages) // POOL_SHARE, *pages) + 1


def served(options: Sequence[str], folder: Path) -> ServingResult | None:
    """What `jointkv bench serve` found; None where it failed. An interrupt ends this program, too."""
    jointkv = str(Path(sys.executable).with_name("jointkv"))
    with subprocess.Popen([jointkv, "bench", "serve", *options, "--output", str(folder)]) as bench:
        while True:
            try:
                ended = bench.wait()
                break
            except KeyboardInterrupt:
                continue  # it stops its server first, and says so
    if ended == INTERRUPTED or ended < 0:
        sys.exit(INTERRUPTED)
    return None if ended else ServingResult.load(folder / RESULT)


def _tokenizer(model: str) -> Any:
    from jointkv.hf.models import load_tokenizer, locate_model

    return load_tokenizer(locate_model(model, fetch=True))


if __name__ == "__main__":
    main()
