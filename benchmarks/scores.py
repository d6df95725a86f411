"""How far the distributions of arms of `jointkv bench serve` move, without servers: KL, top-1, pages freed.

Run it in the environment with vLLM; arms, traffic and sizes are those of the command, and no speed is measured:

    python benchmarks/scores.py --traffic long_documents --requests 2 --name chunk_scope --arm stock --arm 'x=fused ...'
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jointkv.bench.options import Options, make_plan, server_cores
from jointkv.bench.plan import Plan
from jointkv.bench.scoring import runner, score_arms
from jointkv.cli.bench import read_model
from timing import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traffic", default="long_documents")
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--pool-blocks", type=int, default=300)
    parser.add_argument("--max-batched-tokens", type=int, default=512)
    parser.add_argument("--cores", default=None, help="of the engines, such as 0-2,4")
    parser.add_argument("--arm", action="append", required=True)
    parser.add_argument("--name", default="scores", help="of the result")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    plan, cores = planned(arguments)
    rows = [row.model_dump() for row in score_arms(plan, runner(os.environ, plan, cores, said))]
    result = {
        "traffic": plan.facts["traffic"],
        "prompt_tokens": [len(request.prompt) for request in plan.requests],
        "pool_blocks": {arm.name: arm.pool_blocks for arm in plan.arms},
        "arms": {arm.name: arm.fusion for arm in plan.arms},
        "rows": rows,
        "headline": {row["arm"]: {"pages_freed": row["pages_freed"], "kl": row["kl"]} for row in rows},
    }
    write(arguments.output, arguments.name, result)


def planned(arguments: argparse.Namespace) -> tuple[Plan, set[int]]:
    """The requests and arms, and where engines run."""
    missing = dict.fromkeys(field.name for field in dataclasses.fields(Options))
    given = {"model": "smollm2", "one_first": False, "flags": (), "warmup": 0, "block_size": 32, "repeats": 1}
    given |= {"max_running": 64, "eager": True, "fusion": {}, "dtype": "float32", "seed": 0}
    given |= {"traffic": arguments.traffic, "arms": tuple(arguments.arm), "requests": arguments.requests}
    given |= {"output_tokens": arguments.output_tokens, "pool_blocks": arguments.pool_blocks}
    given |= {"max_batched_tokens": arguments.max_batched_tokens, "server_cores": arguments.cores}
    options = Options(**missing | given)  # type: ignore[arg-type]
    return make_plan(options, read_model(options), ""), server_cores(options)


@contextmanager
def said(first: str) -> Iterator[Callable[[str], None]]:
    """Stages as lines."""
    print(first, flush=True)
    yield lambda line: print(line, flush=True)


if __name__ == "__main__":
    main()
