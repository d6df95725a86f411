"""What a token of a compiled model costs with `JointCache` and with `DynamicCache`, in pairs of processes.

Tiny random models, so that what is measured is not the model: `.venv/bin/python benchmarks/compiled.py --layers 6`.
Seconds are of the thread, which other programs on the machine do not add to; each process compiles for itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from timing import write

ARMS = ("dynamic", "joint")
ROWS, PROMPT, TOKENS, REPEATS = 2, 35, 60, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=32, help="hidden size")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--arm", choices=ARMS, help="measure this one in this process")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, arguments.layers, arguments.width, arguments.backend)))
        return
    rows = [run(arm) for _ in range(arguments.pairs) for arm in ARMS]
    each = {arm: median(row["ms_per_token"] for row in rows if row["arm"] == arm) for arm in ARMS}
    write(
        arguments.output,
        "compiled",
        {
            "layers": arguments.layers,
            "width": arguments.width,
            "backend": arguments.backend,
            "rows": rows,
            "headline": {f"ms_per_token_{arm}": round(each[arm], 2) for arm in ARMS},
        },
    )


def run(arm: str) -> dict[str, Any]:
    """One arm in a process of its own, because two would compile the same code for both."""
    child = subprocess.run([sys.executable, *sys.argv, "--arm", arm], stdout=subprocess.PIPE, check=True, text=True)
    row: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    print(row, file=sys.stderr)
    return row


def measure(arm: str, layers: int, width: int, backend: str) -> dict[str, Any]:
    """Compile, and time the tokens of later requests."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(0, 97, (ROWS, PROMPT))
    expected, _ = greedy(model, DynamicCache(config=config), prompt)
    pool = JointPool(model, "safe") if arm == "joint" else None
    compiled = torch.compile(model, backend=backend)
    begin, medians, means = time.perf_counter(), [], []
    for repeat in range(REPEATS + 1):
        cache = DynamicCache(config=config) if pool is None else JointCache(pool)
        tokens, seconds = greedy(compiled, cache, prompt)
        assert torch.equal(tokens, expected)
        if not repeat:
            first = time.perf_counter() - begin
        medians.append(median(seconds[1:]))
        means.append(sum(seconds[1:]) / len(seconds[1:]))
    return {
        "arm": arm,
        "seconds_first_request": first,
        "ms_per_token": 1e3 * median(medians[1:]),
        "ms_per_token_fusion_included": 1e3 * median(means[1:]),
        "ms_per_token_least": 1e3 * min(medians[1:]),
    }


@torch.no_grad()
def greedy(run: Any, cache: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Tokens, and the thread's seconds for each step."""
    ids, mask, chosen, seconds = prompt, torch.ones_like(prompt), [], []
    for _ in range(TOKENS):
        begin = time.thread_time()
        logits = run(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
        seconds.append(time.thread_time() - begin)
        ids = logits.argmax(-1, keepdim=True)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        chosen.append(ids)
    return torch.cat(chosen, 1), seconds


if __name__ == "__main__":
    main()
