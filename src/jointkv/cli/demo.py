"""`jointkv demo`: a real model, kinds of traffic, unfused against `paper` and `safe`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from jointkv.cli.console import named_errors, print_table, progress, stderr_console, write_json
from jointkv.cli.loading import load
from jointkv.cli.options import BlockSize, Dtype, Json, Model, Reuse, ReuseOption, Seed
from jointkv.system.files import make_folder, replace_text

if TYPE_CHECKING:
    from jointkv.evaluate.compare.result import PolicyRow

QUICK_TRAFFICS, TRAFFICS = ("near_prefix", "unrelated"), ("near_prefix", "names", "unrelated")
QUICK, FULL = (6, 16), (24, 48)
"""Requests per near-prefix traffic, and tokens scored after each."""


@named_errors()
def demo(
    model: Model = "smollm2",
    full: bool = typer.Option(
        False, "--full", help="What is published: a third traffic, four times the requests, three times the tokens."
    ),
    requests: int | None = typer.Option(
        None, min=2, help="Requests per near-prefix traffic; a third more are unrelated. Default 6; 24 with --full."
    ),
    tokens: int | None = typer.Option(
        None, min=1, help="True tokens scored after each prompt. Default 16; 48 with --full."
    ),
    key_threshold: float = typer.Option(0.8, help="Cosine threshold of the `paper` policy."),
    max_relative_error: float = typer.Option(0.2, help="Error bound of the `safe` policy."),
    reuse: Reuse = ReuseOption.PROBED,
    block_size: BlockSize = 16,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    output: Path = typer.Option(Path("out/demo"), help="Folder for demo.json, demo.md and demo.png."),
    json: Json = None,
) -> None:
    """Fuse real requests on a real model: what it saves, what it costs.

    Pages and bytes are counted at the allocator. KL, top-1 and NLL compare the distributions over the true next
    tokens with those of the same model unfused, on the same requests. float32 is the default because in bfloat16
    rounding alone moves this small model by more than the fusion that is to be measured.
    """
    # Threads of torch that spin while they wait for each other take three times as long where others use the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from jointkv.evaluate.compare.policies import compare_policies
    from jointkv.evaluate.holding.prefilled import prefill
    from jointkv.evaluate.traffic import get_traffic
    from jointkv.hf.reuse import ReuseOptions
    from jointkv.policy import FusionPolicy
    from jointkv.report.pictures.demo import NUMBERS, TEXT, draw, markdown
    from jointkv.system.machine import versions

    policies = {
        "safe": FusionPolicy.preset("safe", max_relative_error=max_relative_error),
        "paper": FusionPolicy.preset("paper", key_threshold=key_threshold),
    }
    given = zip((requests, tokens), FULL if full else QUICK, strict=True)
    requests, tokens = (default if value is None else value for value, default in given)
    traffics = TRAFFICS if full else QUICK_TRAFFICS
    options = ReuseOptions(reuse.value, seed=seed)
    make_folder(output)
    loaded, tokenizer = load(model, dtype)
    rows: list[PolicyRow] = []
    with progress(len(traffics) * (2 + len(policies) + (reuse is not ReuseOption.OFF))) as steps:
        for name in traffics:
            count = requests if name != "unrelated" else requests * 4 // 3
            made = get_traffic(name).requests(tokenizer, count, continuation_tokens=tokens, seed=seed)
            steps.start(f"{name}: prefill of {count} requests")
            batch = prefill(loaded, made, block_size=block_size)
            rows += compare_policies(loaded, batch, policies, name, steps.start, options)
    settings = {"block_size": block_size, "tokens": tokens, "seed": seed, "requests": requests, "dtype": dtype}
    settings |= {"reuse": reuse}
    result = {
        "format": "jointkv.demo/1",
        "model": model,
        "settings": settings,
        "policies": policies,
        "versions": versions(),
        "rows": rows,
    }
    write_json(output / "demo.json", result)
    write_json(json, result)
    replace_text(output / "demo.md", markdown(rows))
    draw(rows, output / "demo.png")
    if json != "-":
        columns = {**TEXT, **NUMBERS}
        print_table(
            "", columns, [[write(row) for write in columns.values()] for row in rows], words=len(TEXT), width=150
        )
    stderr_console().print(f"wrote demo.json, demo.md and demo.png to {output}")
