"""Can another's text be guessed block by block inside one key, by the time to the first token? Stock, fused, reuse.

Run it in the environment with vLLM:
`.venv-vllm/bin/python benchmarks/side_channel_blocks.py --output docs/results/side_channel/blocks.json`.
A victim was served a text behind a first line that nobody can guess, and has gone. The attacker knows the text's first
blocks and guesses the next one: he sends them behind another line, with other text after them, and times the answer.
Whether the guess is right is drawn at random, every trial has text of its own, and prompts are of equal length.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines import prepare_environment, scheduler_of
from jointkv.system.files import replace_text
from jointkv.system.machine import allowed_cores, machine, versions
from side_channel import ACTS_AT_ONCE, ARMS, SALTS, TINY, build, prepare_model, texts
from side_channel_statistics import separation
from side_channel_trials import ANSWER, ATTACKER, BLOCK, CLOCKS, FIRST_LINE, VICTIM, Attack, Case, Sizes

FORMAT = "jointkv.side_channel_blocks/1"
REUSE = {**ACTS_AT_ONCE, "max_relative_error": 0.2, "max_token_error": 0.3, "reuse": "probed", "reuse_audit_rate": 1e-9}
SERVED: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "fused": ARMS["fused, bound 0.2"][0],
    "reuse": REUSE,
    "reuse, strict": {**REUSE, "isolation": "strict"},
}
TEXT_BLOCKS, KNOWN = 7, 3
"""Blocks of the victim's text, and those that the attacker knows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY, help=f"known name, folder, or {TINY!r}: a small random model")
    parser.add_argument("--arm", choices=SERVED, action="append", help="may be repeated; all by default")
    parser.add_argument("--trials", type=int, default=50, help="of each class in each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    prepare_environment(2**30, sorted(allowed_cores())[-1:])
    os.environ.update({"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_CI_ENV": "1"})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="jointkv-side-channel-") as work:
        model = prepare_model(arguments.model, Path(work))
        for arm in dict.fromkeys(arguments.arm or SERVED):
            rows += run_arm(model, arm, arguments.trials, arguments.seed)
            for row in rows:
                if row["arm"] == arm:
                    print({name: row[name] for name in ("arm", "salts", "observable", "auc", "p_value")}, flush=True)
    found = {
        "format": FORMAT,
        "model": arguments.model,
        "trials": arguments.trials,
        "sizes": {"block": BLOCK, "text_blocks": TEXT_BLOCKS, "known_blocks": KNOWN},
        "arms": SERVED,
        "versions": versions(),
        "machine": machine(),
        "rows": rows,
    }
    replace_text(arguments.output, json.dumps(found, indent=1) + "\n")


def run_arm(model: str, arm: str, trials: int, seed: int) -> list[dict[str, Any]]:
    """A row for each observable, with and without different salts."""
    from jointkv.vllm_plugin.doctor.trial import stop_engine

    sizes = Sizes(TEXT_BLOCKS)
    engine = build(model, SERVED[arm], True, sizes)
    attack = Attack(engine, sizes, texts(engine.vllm_config.model_config.get_vocab_size(), seed))
    draw = random.Random(seed)
    seen: dict[tuple[str, str], dict[bool, list[float]]] = {}
    for number in range(trials + 2):
        cases = [(salts, right) for salts in SALTS for right in (False, True)]
        for salts, right in draw.sample(cases, len(cases)):
            for observable, value in trial(attack, SALTS[salts], right).items():
                if number >= 2:  # the first ones warm up
                    seen.setdefault((salts, observable), {False: [], True: []})[right].append(value)
    if attack.faults():
        raise RuntimeError(f"{arm}: the plugin switched itself off during the trials")
    stop_engine(engine)
    return [
        {"arm": arm, "salts": salts, "observable": observable, **asdict(separation(found[False], found[True]))}
        for (salts, observable), found in sorted(seen.items())
    ]


def trial(attack: Attack, salted: bool, right: bool) -> dict[str, float]:
    """What the attacker sees when the block that he guesses is the victim's, and when it is not."""
    case = Case("idle", "near", salted, right)
    length, known = attack.sizes.prompt - FIRST_LINE, (1 + KNOWN) * BLOCK - FIRST_LINE
    secret, other, rest = (attack.texts.text(count) for count in (length, BLOCK, length - known - BLOCK))
    attack._send(attack.texts.line() + secret, 2, case, VICTIM)
    attack._until_done()
    before = skipped(attack)
    guess = secret[known : known + BLOCK] if right else other
    probe = attack._send(attack.texts.line() + secret[:known] + guess + rest, ANSWER, case, ATTACKER)
    attack._until_done()
    times = {prefix + "ttft": probe.times(clock)["ttft"] for clock, prefix in enumerate(CLOCKS)}
    return {**times, "cached_tokens": probe.cached, "metrics_skipped": skipped(attack) - before}


def skipped(attack: Attack) -> int:
    """Tokens of prompts that were not computed, as `/metrics` says."""
    connector = scheduler_of(attack.engine).connector
    return 0 if connector is None else connector.scheduler.totals()["prompt_tokens_skipped"]


if __name__ == "__main__":
    main()
