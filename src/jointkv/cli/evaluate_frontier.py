"""`jointkv evaluate frontier`: can text that is merely alike share pages, and at what KL?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from jointkv.cli.console import named_errors, print_table, progress, write_json, wrote
from jointkv.cli.loading import load
from jointkv.cli.options import Dtype, Json, Model, Seed
from jointkv.system.files import make_folder

if TYPE_CHECKING:
    from jointkv.evaluate.frontier.result import FrontierResult, FrontierRow


@named_errors()
def frontier(
    model: Model = "smollm2",
    traffic: list[str] | None = typer.Option(None, help="Kind of requests; may be repeated. Default three."),
    requests: int = typer.Option(12, help="Requests of each kind."),
    tokens: int = typer.Option(24, min=1, help="True tokens scored after each prompt."),
    block_size: list[int] | None = typer.Option(
        None, min=1, help="Tokens per block; may be repeated. Default 4 and 16."
    ),
    layer_groups: list[str] | None = typer.Option(
        None, help="Groups of layers that decide apart, or per_layer; may be repeated. Default 1 and per_layer."
    ),
    bound: list[float] | None = typer.Option(
        None, help="Relative error of a block; may be repeated. Default 0.1 to 0.8."
    ),
    cosine: list[float] | None = typer.Option(
        None, help="Least cosine where keys alone decide; may be repeated. Default 0.98 to 0.8."
    ),
    dtype: Dtype = "float32",
    seed: Seed = 0,
    output: Path = typer.Option(Path("out/frontier"), help="Folder for frontier.json."),
    json: Json = None,
) -> None:
    """Find the best ratio within a KL, for equal and similar text.

    Tries every combination of error bound, layer groups, block size, and of what serves: a page as it stands, or the
    mean direction of a group with each member's own norms; a series ends where KL passes 0.1.
    """
    from jointkv.evaluate.frontier.grid import FrontierSettings
    from jointkv.evaluate.frontier.result import FrontierResult
    from jointkv.evaluate.frontier.run import run_frontier, steps

    chosen = {
        "traffics": tuple(traffic or ()),
        "block_sizes": tuple(block_size or ()),
        "layer_groups": tuple(map(_groups, layer_groups or ())),
        "bounds": tuple(sorted(bound or ())),
        "cosines": tuple(sorted(cosine or (), reverse=True)),
    }
    sizes = {"requests": requests, "tokens": tokens, "seed": seed}
    settings = FrontierSettings(**sizes, **{name: values for name, values in chosen.items() if values})  # type: ignore[arg-type]
    settings.check()
    make_folder(output)
    loaded, tokenizer = load(model, dtype)
    with progress(steps(settings)) as bar:
        rows = list(run_frontier(loaded, tokenizer, settings, bar.start))
    result = FrontierResult(model=model, dtype=dtype, settings=asdict(settings), rows=rows)
    write_json(output / "frontier.json", result)
    write_json(json, result)
    if json != "-":
        _print(result)
    wrote(output / "frontier.json")


def _groups(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _print(result: FrontierResult) -> None:
    from jointkv.evaluate.frontier.result import KL_LIMITS, best_within

    kinds = dict.fromkeys((row.traffic, row.candidates) for row in result.rows)
    rows = [
        [
            *kind,
            *(
                _cell(best_within([row for row in result.rows if (row.traffic, row.candidates) == kind], limit))
                for limit in KL_LIMITS
            ),
        ]
        for kind in kinds
    ]
    columns = ("traffic", "candidates", *(f"KL at most {limit:g}" for limit in KL_LIMITS))
    print_table("Largest ratio of pages (block size, layer groups, what serves, level)", columns, rows)


def _cell(row: FrontierRow | None) -> str:
    if row is None:
        return "-"
    return f"{row.ratio:.2f} ({row.block_size}, {row.layer_groups}, {row.serves}, {row.decides} {row.level:g})"
