"""`jointkv evaluate reuse`: what predicts a block that is not computed, behind four kinds of headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from jointkv.cli.console import named_errors, print_table, progress, write_json, wrote
from jointkv.cli.loading import load
from jointkv.cli.options import SEEDS, Dtype, Json, Model
from jointkv.system.files import make_folder

if TYPE_CHECKING:
    from jointkv.evaluate.reuse.result import Evidenced, ReuseResult, Share

QUICK = {"texts": 2, "headers": 8, "text_tokens": 192, "witnesses": (0, 2, 4), "sources": (1, 3)}


@named_errors()
def reuse(
    model: Model = "smollm2",
    kind: list[str] | None = typer.Option(None, help="ids, names, instructions or museum; may be repeated."),
    texts: int = typer.Option(4, help="Texts of each kind."),
    headers: int = typer.Option(20, help="Headers before each text."),
    text_tokens: int = typer.Option(384, help="Tokens of a text."),
    witnesses: list[int] | None = typer.Option(None, help="Comparisons a page has heard. Default 0, 2, 8 and 15."),
    quick: bool = typer.Option(False, "--quick", help="Two short texts and eight headers: shows that it runs."),
    dtype: Dtype = "float32",
    seed: int = typer.Option(0, help="Of headers, texts and draws.", **SEEDS),
    output: Path = typer.Option(Path("out/evaluate-reuse"), help="Folder for reuse.json."),
    json: Json = None,
) -> None:
    """Find which blocks may be reused without computing them.

    Measured is the share of tokens skipped at an audited miss rate. The same texts are prefilled behind headers that
    differ: ids, names, instructions, and facts about a customer before a list in which such facts recur. Every
    request's blocks are compared with every other's, and predictors that know the entry block, earlier comparisons or
    the header's tokens are asked which they would reuse. Limits are chosen on other texts than those they are measured
    on.
    """
    from jointkv.evaluate.reuse.experiment import run_reuse, steps
    from jointkv.evaluate.reuse.setup import ReuseSettings

    chosen = {"kinds": tuple(kind or ()), "witnesses": tuple(witnesses or ())}
    sizes = {"texts": texts, "headers": headers, "text_tokens": text_tokens, "seed": seed}
    given = {**sizes, **(QUICK if quick else {}), **{name: values for name, values in chosen.items() if values}}
    settings = ReuseSettings(**given)  # type: ignore[arg-type]
    make_folder(output)
    loaded, tokenizer = load(model, dtype)
    with progress(steps(settings)) as bar:
        result = run_reuse(loaded, tokenizer, model, dtype, settings, bar.start)
    write_json(output / "reuse.json", result)
    write_json(json, result)
    if json != "-":
        _print(result)
    wrote(output / "reuse.json")


def _print(result: ReuseResult) -> None:
    kinds = list(dict.fromkeys(row.kind for row in result.texts))
    size = max(row.block_size for row in result.texts)
    columns = ("evidence", "predictor", "all kinds", *kinds)
    for chosen, title in (("all", "one limit for all kinds"), ("kind", "a limit for each kind")):
        rows = [
            [_known(row), row.predictor, *(_cell(row.shares.get(kind)) for kind in ("all", *kinds))]
            for row in result.held_out
            if (row.block_size, row.rate, row.chosen) == (size, 0.01, chosen)
        ]
        print_table(
            f"Tokens skipped (blocks missed) at 1%, {title}, chosen on other texts, blocks of {size}", columns, rows
        )
    rows = [
        [_known(row), "default", *(_cell(row.shares.get(kind)) for kind in ("all", *kinds))]
        for row in result.rule
        if row.block_size == size
    ]
    print_table("The rule of the engine", columns, rows)


def _known(row: Evidenced) -> str:
    return f"{row.sources} sources, {row.witnesses} witnesses"


def _cell(share: Share | None) -> str:
    if share is None:
        return "-"
    return f"{share.skipped:.1%}" + ("" if share.missed is None else f" ({share.missed:.2%})")
