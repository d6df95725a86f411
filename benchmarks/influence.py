"""How far can one tenant's content move another's answers, when both share an isolation key?

An attacker sends text that a victim will send too, behind another beginning; its blocks become resident, and the
victim is served from them within the bound. The attacker's beginning is real text, random tokens, or found by a
search that sees the victim's KL (a white box, more than an attacker has). All of it on the `transformers` cache, with
blocks compared where their tokens are equal, as in vLLM:
`python benchmarks/influence.py --output docs/results/side_channel/influence.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engines import corpus
from influence_attack import DRIFTS, Target, Victim, search
from jointkv.hf.models import load_model
from jointkv.policy import FusionPolicy
from jointkv.system.files import replace_text
from jointkv.system.machine import machine, versions
from jointkv.theory.calibrate import TOKEN_SLACK

FORMAT = "jointkv.influence/1"
BOUNDS = (0.05, 0.1, 0.2, 0.5, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="known name or folder")
    parser.add_argument(
        "--bound", type=float, action="append", help="may be repeated; the bound on tokens is 1.5 times"
    )
    parser.add_argument("--victims", type=int, default=4)
    parser.add_argument("--attackers", type=int, default=8, help="real texts, and as many random ones, for each victim")
    parser.add_argument("--generations", type=int, default=6, help="of the search, for each victim and bound")
    parser.add_argument("--width", type=int, default=8, help="beginnings tried in each generation")
    parser.add_argument("--prefix-tokens", type=int, default=32, help="that the attacker is free to choose")
    parser.add_argument("--shared-tokens", type=int, default=128)
    parser.add_argument("--tail-tokens", type=int, default=16, help="after which the distributions are compared")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    arguments.bound = arguments.bound or list(BOUNDS)
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Every victim under every bound; the file is written after each victim."""
    model, tokenizer = load_model(arguments.model, dtype="float32")
    text = corpus(tokenizer)
    special = set(tokenizer.all_special_ids)
    vocabulary = [token for token in range(model.config.vocab_size) if token not in special]
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    for number in range(arguments.victims):
        rows += attack(model, number, windows(text, arguments.seed + number), vocabulary, arguments)
        replace_text(arguments.output, json.dumps(result(arguments, rows, load), indent=1) + "\n")


def result(arguments: argparse.Namespace, rows: list[dict[str, Any]], load: float) -> dict[str, Any]:
    """What is written; `load` is the machine's load average at the start."""
    return {
        "format": FORMAT,
        "model": arguments.model,
        "dtype": "float32",
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("output", "model")},
        "search_budget": arguments.generations * arguments.width,
        "versions": versions(),
        "machine": {**machine(), "load_average": [load, os.getloadavg()[0]]},
        "rows": rows,
    }


def windows(text: Sequence[int], seed: int) -> Iterator[tuple[int, ...]]:
    """Stretches of 1024 tokens from random places."""
    rng = random.Random(seed)
    while True:
        start = rng.randrange(len(text) - 1024)
        yield tuple(text[start : start + 1024])


def attack(
    model: Any, number: int, texts: Iterator[tuple[int, ...]], vocabulary: Sequence[int], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One victim under every bound: attackers drawn at random, then the search from the best of them."""
    start, length = time.monotonic(), arguments.prefix_tokens
    shared = next(texts)[: arguments.shared_tokens + arguments.tail_tokens]
    victim = Victim(next(texts)[:length], shared[: arguments.shared_tokens], shared[arguments.shared_tokens :])
    policies = {
        bound: FusionPolicy.preset(
            "safe", max_relative_error=bound, max_token_error=TOKEN_SLACK * bound, candidates="tokens"
        )
        for bound in arguments.bound
    }
    target = Target(model, victim, policies, arguments.block_size)
    rng = random.Random(arguments.seed + number)
    drawn = {
        "text": [next(texts)[:length] for _ in range(arguments.attackers)],
        "tokens": [tuple(rng.choices(vocabulary, k=length)) for _ in range(arguments.attackers)],
    }
    states = {kind: target.states(prefixes) for kind, prefixes in drawn.items()}
    rows = []
    for bound in arguments.bound:
        best = (0.0, drawn["text"][0], states["text"][0])
        for kind, prefixes in drawn.items():
            outcomes = [target.serve(state, bound) for state in states[kind]]
            rows.append({"victim": number, "bound": bound, "attacker": kind, **describe(outcomes)})
            candidates = zip((outcome.mean_kl for outcome in outcomes), prefixes, states[kind], strict=True)
            best = max(best, *candidates, key=lambda each: each[0])
        rows.append(
            {
                "victim": number,
                "bound": bound,
                "attacker": "search",
                **searched(target, bound, best[:2], vocabulary, arguments, rng),
            }
        )
        print(f"victim {number}, bound {bound:g}: random {best[0]:.2g}, search {max(rows[-1]['kl']):.2g}", flush=True)
    rows[-1]["seconds"] = time.monotonic() - start
    return rows


def searched(
    target: Any,
    bound: float,
    start: tuple[float, tuple[int, ...]],
    vocabulary: Sequence[int],
    arguments: argparse.Namespace,
    rng: random.Random,
) -> dict[str, Any]:
    """The worst attacker that the search finds, and what theory says about the attention rows that read its pages."""

    def score(prefixes: list[tuple[int, ...]]) -> list[float]:
        return [target.serve(state, bound).mean_kl for state in target.states(prefixes)]

    prefix, history = search(score, start[1], start[0], vocabulary, arguments.generations, arguments.width, rng)
    (state,) = target.states([prefix])
    return {
        **describe([target.serve(state, bound)]),
        "history": history,
        "prefix": list(prefix),
        "rows": theory(target.drift(state, bound)),
    }


def describe(outcomes: Sequence[Any]) -> dict[str, Any]:
    """Lists over attackers: mean and largest KL after the tail tokens, changed top-1, blocks served, errors."""
    return {
        "kl": [outcome.mean_kl for outcome in outcomes],
        "kl_worst_token": [max(outcome.kl) for outcome in outcomes],
        "changed": [outcome.changed for outcome in outcomes],
        "blocks": [outcome.blocks for outcome in outcomes],
        "block_error": [outcome.block_error for outcome in outcomes],
        "token_error": [outcome.token_error for outcome in outcomes],
    }


def theory(layers: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Bound and what happened in the row with the largest of each, over all layers, heads and tail tokens."""
    found = {}
    for name in DRIFTS:
        parts = [getattr(layer, name) for layer in layers]
        found[name] = {
            "bound": max(float(part.bound.max()) for part in parts),
            "actual": max(float(part.actual.max()) for part in parts),
            "holds": all(part.holds() for part in parts),
        }
    return found


if __name__ == "__main__":
    main()
