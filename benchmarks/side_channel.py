"""Can an attacker who sends prompts and times answers learn what another user has just sent? vLLM, stock and fused.

Run it in the environment with vLLM:
`.venv-vllm/bin/python benchmarks/side_channel.py --output docs/results/side_channel/smollm2.json`.
The engine runs in this process and is timed between its steps, so the attacker has no network noise: his best case.
Beside the time that passes, the engine's processor time is taken: on a busy machine it shows what a quiet one would.
Whether the guess is resident is drawn at random trial by trial, every trial has text of its own, and the other class
is another text of the same length. What `/metrics` and the field `cached_tokens` of the OpenAI API say is listed too:
an operator exposes them or does not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines import corpus, prepare_environment, write_calm_model
from jointkv.errors import BadInput
from jointkv.system.files import replace_text
from jointkv.system.machine import allowed_cores, machine, versions
from side_channel_statistics import LEVEL, separation, smallest_detectable_auc
from side_channel_trials import ANSWER, BLOCK, FIRST_LINE, Attack, Case, Sizes, Texts, schedule

FORMAT = "jointkv.side_channel/1"
TINY = "tiny"
ACTS_AT_ONCE = {"min_pool_usage": 0.0}
ARMS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "stock": (None, True),
    "stock, no prefix cache": (None, False),
    "fused, bound 0": ({**ACTS_AT_ONCE, "max_relative_error": 0.0, "max_token_error": 0.0}, True),
    "fused, bound 0.2": ({**ACTS_AT_ONCE, "max_relative_error": 0.2, "max_token_error": 0.3}, True),
    "fused, bound 0.5": ({**ACTS_AT_ONCE, "max_relative_error": 0.5, "max_token_error": 0.75}, True),
    "fused, bound 0.2, no prefix cache": ({**ACTS_AT_ONCE, "max_relative_error": 0.2, "max_token_error": 0.3}, False),
}
"""Options of the plugin (None: without it), and whether prefix caching is on."""
SALTS = {"none": False, "different": True}
TIMES = {
    "ttft": "seconds to the first token of the probe",
    "itl": "seconds between the probe's tokens, mean",
    "e2e": "seconds to the probe's last token",
    "gauge_ttft": "seconds to the first token of another request, sent while the probe runs and few pages are free",
    "turn_ttft": "seconds to the first token of a second turn: the probe, its answer, a few words more",
}
OBSERVABLES = {
    **TIMES,
    **{f"cpu_{name}": f"{text}; processor time of the engine" for name, text in TIMES.items()},
    "cached_tokens": "cached_tokens of the probe's usage field, where the server shows it",
    "turn_cached_tokens": "cached_tokens of the second turn's usage field",
    "metrics_merged": "growth of jointkv_blocks_merged_total on /metrics around the probe",
}
WARM_UP_ROUNDS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help=f"known name, folder, or {TINY!r}: a small random model")
    parser.add_argument("--arm", choices=ARMS, action="append", help="may be repeated; all by default")
    parser.add_argument("--salts", choices=SALTS, action="append", help="of victim and attacker; both by default")
    parser.add_argument("--trials", type=int, default=100, help="of each class in each case")
    parser.add_argument("--cores", type=int, default=1, help="that the engine runs on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; arms that it has already stay in it")
    arguments = parser.parse_args()
    sizes, salted = Sizes(), [SALTS[name] for name in arguments.salts or SALTS]
    arms = list(dict.fromkeys(arguments.arm or ARMS))
    prepare_environment(2**30, sorted(allowed_cores())[-arguments.cores :])
    os.environ.update({"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_CI_ENV": "1"})
    with tempfile.TemporaryDirectory(prefix="jointkv-side-channel-") as work:
        model = prepare_model(arguments.model, Path(work))
        for arm in arms:
            found = run_arm(model, arm, sizes, arguments.trials, salted, arguments.seed)
            write(arguments.output, result(arguments, sizes, kept(arguments, arm), arm, found))


def prepare_model(name: str, work: Path) -> str:
    from jointkv.hf.models import KNOWN_MODELS, fetch_model

    if name == TINY:
        from jointkv.vllm_plugin.doctor.trial import TINY_MODEL

        # As in a trained one, another first line changes K and V of what follows a little.
        return write_calm_model(work / TINY, 0.15, **TINY_MODEL)
    return str(fetch_model(name)) if name in KNOWN_MODELS else name


def run_arm(model: str, arm: str, sizes: Sizes, rounds: int, salted: Sequence[bool], seed: int) -> dict[str, Any]:
    """All trials of one arm: samples by case and observable, and what the machine did meanwhile."""
    from jointkv.vllm_plugin.doctor.trial import stop_engine

    engine = build(model, *ARMS[arm], sizes)
    attack = Attack(engine, sizes, texts(engine.vllm_config.model_config.get_vocab_size(), seed))
    for case in schedule(WARM_UP_ROUNDS, salted, seed + 1):
        attack.run(case)
    load, start = os.getloadavg(), time.monotonic()
    seen = measure(attack, schedule(rounds, salted, seed))
    if attack.faults():
        raise RuntimeError(f"{arm}: the plugin switched itself off during the trials")
    meanwhile = {"seconds": time.monotonic() - start, "load_average": [load[0], os.getloadavg()[0]]}
    print(f"{arm}: {meanwhile}", flush=True)
    stop_engine(engine)
    return {"machine": meanwhile, "seen": seen}


def measure(attack: Attack, cases: Sequence[Case]) -> dict[tuple[str, str, bool], dict[str, dict[bool, list[float]]]]:
    """Samples by scenario, guess and salts, then by observable, then by class."""
    seen: dict[tuple[str, str, bool], dict[str, dict[bool, list[float]]]] = {}
    for case in cases:
        found = seen.setdefault((case.scenario, case.guess, case.salted), {})
        for name, value in attack.run(case).items():
            found.setdefault(name, {False: [], True: []})[case.resident].append(value)
    return seen


def build(model: str, fusion: dict[str, Any] | None, prefix_caching: bool, sizes: Sizes) -> Any:
    from vllm import LLM

    from jointkv.vllm_plugin import engine_args

    return LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=prefix_caching,
        block_size=BLOCK,
        num_gpu_blocks_override=sizes.pages,
        max_model_len=2 * sizes.prompt,
        max_num_batched_tokens=4 * sizes.prompt,
        max_num_seqs=8,
        seed=0,
        **({} if fusion is None else engine_args(**fusion)),
    ).llm_engine


def texts(vocabulary: int, seed: int) -> Texts:
    """Windows of the novel and the reports that the package carries, in ids below `vocabulary`."""
    from jointkv.evaluate.traffic.base import encode
    from jointkv.evaluate.traffic.near_prefix import session_line
    from jointkv.hf.models import fetch_model, load_tokenizer

    fetch_model("smollm2")
    tokenizer = load_tokenizer("smollm2")
    draw = random.Random(seed)

    def lines() -> Iterator[list[int]]:
        used: set[int] = set()
        while True:
            session = draw.randrange(10**8)
            if session not in used:
                used.add(session)
                yield [token % vocabulary for token in encode(tokenizer, session_line(session, draw))[:FIRST_LINE]]

    return Texts([token % vocabulary for token in corpus(tokenizer)], lines(), seed)


def kept(arguments: argparse.Namespace, arm: str) -> dict[str, Any]:
    """What the file holds of other arms, which stays in it. Raises BadInput when it is of another model."""
    if not arguments.output.exists():
        return {"rows": [], "runs": {}}
    found: dict[str, Any] = json.loads(arguments.output.read_text())
    if (found.get("format"), found.get("model")) != (FORMAT, arguments.model):
        raise BadInput(f"{arguments.output}: not a result of this benchmark with model {arguments.model}")
    found["rows"] = [row for row in found["rows"] if row["arm"] != arm]
    return found


def result(
    arguments: argparse.Namespace, sizes: Sizes, before: dict[str, Any], arm: str, found: dict[str, Any]
) -> dict[str, Any]:
    """What is written: every case and observable with its samples; `before` holds the other arms."""
    fusion, prefix_caching = ARMS[arm]
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "arm", "model")}
    run = {"fusion": fusion, "prefix_caching": prefix_caching, **settings, **found["machine"]}
    rows = [*before["rows"], *summarize(arm, found["seen"])]
    tested = max(1, sum(row["varies"] for row in rows))
    for row in rows:
        row["found"] = row["p_value"] < LEVEL / tested
    fewest = min(min(row["absent"], row["resident"]) for row in rows)
    return {
        "format": FORMAT,
        "model": arguments.model,
        "dtype": "float32",
        "sizes": {"block": BLOCK, "prompt": sizes.prompt, "answer": ANSWER, "gauge": sizes.gauge, "pages": sizes.pages},
        "runs": {**before["runs"], arm: run},
        "versions": versions(),
        "machine": machine(),
        "observables": OBSERVABLES,
        "tests": tested,
        "level": LEVEL,
        "smallest_auc": smallest_detectable_auc(fewest, fewest, tested),
        "smallest_auc_single_test": smallest_detectable_auc(fewest, fewest),
        "rows": rows,
    }


def summarize(arm: str, seen: dict[tuple[str, str, bool], dict[str, dict[bool, list[float]]]]) -> list[dict[str, Any]]:
    """One row per case and observable."""
    rows = []
    for (scenario, guess, salted), observable in itertools.product(sorted(seen), OBSERVABLES):
        samples = seen[scenario, guess, salted].get(observable)
        if samples is None:
            continue
        absent, resident = samples[False], samples[True]
        rows.append(
            {
                "arm": arm,
                "scenario": scenario,
                "guess": guess,
                "salts": "different" if salted else "none",
                "observable": observable,
                **asdict(separation(absent, resident)),
                "varies": len({*absent, *resident}) > 1,
                "values_absent": [_short(value) for value in absent],
                "values_resident": [_short(value) for value in resident],
            }
        )
    return rows


def _short(value: float) -> float:
    """Times to the microsecond; a digit more would be noise."""
    return value if value == math.floor(value) else round(value, 6)


def write(path: Path, found: dict[str, Any]) -> None:
    """Write the result, a line for each row."""
    rows = found.pop("rows")
    head = json.dumps(found, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    replace_text(path, f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    print(f"{path}: {sum(row['found'] for row in rows)} of {len(rows)} told apart", flush=True)


if __name__ == "__main__":
    main()
