"""Pages that theory predicts of a serving engine against those that it keeps, for candidates by text and by content.

Run it in the environment with vLLM: `python benchmarks/engine_prediction.py --output docs/results/bench`. Half of the
requests opt out: from all pairs of their blocks rarefaction predicts the ratio of a batch of as many others, of which
online search takes the blocks as they come. The other half is that batch, in one step of the engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines import BLOCK_SIZE, build, in_a_process_of_its_own, prepare_environment, tell
from jointkv.core.blocks import PagedKV, served_errors
from jointkv.fusion.pairs import pair_statistics
from jointkv.policy.rule import Rule
from jointkv.theory.rarefaction import rarefaction
from paper_plan import LAYER_GROUPS, SETTLED, copied, tables
from timing import write

PAPER = {"policy": "paper", "accept_unbounded": True, "layer_groups": LAYER_GROUPS}
SAFE: dict[str, Any] = {"max_candidates": 8}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "near-prefix, tokens": ("near_prefix", {**SAFE, "candidates": "tokens"}),
    "near-prefix, both": ("near_prefix", {**SAFE, "candidates": "both"}),
    "unrelated, both": ("unrelated", {**SAFE, "candidates": "both"}),
    "unrelated, paper 0.75": ("unrelated", {**PAPER, "key_threshold": 0.75}),
    "unrelated, paper 0.9": ("unrelated", {**PAPER, "key_threshold": 0.9}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8, help="that predict, and as many that are measured")
    parser.add_argument("--blocks", type=int, default=3, help="of each")
    parser.add_argument("--seed", type=int, default=0, help="of the first of three drawings")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    prepare_environment(2 << 30)
    if arguments.one:
        tell(run(arguments.one[0], int(arguments.one[1]), arguments.requests, arguments.blocks))
    size = ("--requests", str(arguments.requests), "--blocks", str(arguments.blocks))
    rows = [
        in_a_process_of_its_own(__file__, *size, "--one", name, str(seed))
        for seed in range(arguments.seed, arguments.seed + 3)
        for name in arguments.runs
    ]
    headline = {
        f"{row['run']}, seed {row['seed']}": [round(row[name], 2) for name in ("measured", "predicted", "low", "high")]
        for row in rows
    }
    write(arguments.output, "engine_prediction", {"rows": rows, "headline": headline})


def run(name: str, seed: int, requests: int, blocks: int) -> dict[str, Any]:
    """One engine: what those that opt out predict, and what becomes of the others."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from jointkv.evaluate.traffic import get_traffic
    from jointkv.hf.models import fetch_model
    from jointkv.vllm_plugin import engine_args
    from jointkv.vllm_plugin.settings import PluginSettings

    traffic, options = RUNS[name]
    groups = options.get("layer_groups", 1)
    pages, length = 1 + 2 * groups * requests * (blocks + 2), (blocks + 2) * BLOCK_SIZE
    attached = engine_args(min_pool_usage=0.0, **options)
    engine = build("float32", 2 * requests, pages, max_model_len=length, enable_prefix_caching=False, **attached)
    tokenizer = AutoTokenizer.from_pretrained(fetch_model("smollm2"))
    drawn = get_traffic(traffic).requests(tokenizer, 2 * requests, seed=seed)
    prompts = [list(request.prompt)[: blocks * BLOCK_SIZE + BLOCK_SIZE // 4] for request in drawn]
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(
            temperature=0,
            max_tokens=SETTLED + 2,
            ignore_eos=True,
            detokenize=False,
            extra_args={"jointkv": number < requests},
        )
        engine.add_request(f"{number:04}", {"prompt_token_ids": prompt}, sampling)
    engine.step()
    held = get_kv_transfer_group().worker.comparer.groups
    kept = {group: copied(view, tables(engine, group, blocks)[:, requests:]) for group, view in held.items()}
    for _ in range(SETTLED):
        engine.step()
    left = sum(len(set(row)) for group in held for row in tables(engine, group, blocks)[:, :requests].tolist())
    policy = PluginSettings.parse(options).fusion_policy()
    accepted = torch.cat([accepts(kv, policy.rule(0), blocks, requests) for kv in kept.values()])
    if policy.candidates == "tokens":
        accepted &= equal_text(prompts[requests:], blocks).repeat(len(kept), 1, 1)
    (predicted,) = rarefaction(accepted.numpy(), None, [requests])
    return {
        "run": name,
        "seed": seed,
        "requests": requests,
        "measured": len(held) * blocks * requests / left,
        "predicted": predicted.ratio,
        "low": predicted.low,
        "high": predicted.high,
    }


def accepts(kv: PagedKV, rule: Rule, blocks: int, requests: int) -> Tensor:
    """Which pairs of a position the rule allows, `[blocks, requests, requests]`: `[i, j]`, j may serve i."""
    numbers = torch.arange(blocks * requests).view(blocks, requests)
    own, other = numbers.repeat_interleave(requests), numbers.repeat(1, requests).flatten()
    errors = served_errors(kv, own, other, rule.across_layers)
    cosines = pair_statistics(kv, numbers, rule).key_cosine
    asked = (None if cosines is None else cosines.flatten(), None)
    return rule.allows(errors, asked).view(blocks, requests, requests)


def equal_text(prompts: Sequence[list[int]], blocks: int) -> Tensor:
    """Which blocks of a position have the same tokens, `[blocks, requests, requests]`."""
    tokens = torch.tensor([prompt[: blocks * BLOCK_SIZE] for prompt in prompts]).unflatten(1, (blocks, BLOCK_SIZE))
    return (tokens[:, None] == tokens[None]).all(3).permute(2, 0, 1)


if __name__ == "__main__":
    main()
