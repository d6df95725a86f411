"""`jointkv inspect`: how alike the KV blocks of real requests are, layer by layer, and what need not be computed."""

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from jointkv.cli.console import named_errors, require, stages, stdout_console, write_json, wrote
from jointkv.cli.loading import load, locate
from jointkv.cli.options import BlockSize, ChunkTokens, Data, Json, Model, Seed
from jointkv.errors import BadInput
from jointkv.system.files import make_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from jointkv.evaluate.holding.prefilled import Prefilled
    from jointkv.evaluate.predict.reuse import Reusable
    from jointkv.evaluate.predict.similarity import Similarity

STAGE_LINES = 8
"""Progress messages per stage at the most, for logs."""


class InspectScope(StrEnum):
    """What is compared: different requests, the blocks of one request, or both."""

    BATCH = "batch"
    CHUNK = "chunk"
    BOTH = "both"


@named_errors()
def inspect(
    model: Model = "smollm2",
    data: Data = None,
    traffic: str = typer.Option("near_prefix", help="Without --data: built-in traffic, such as names or unrelated."),
    requests: int = typer.Option(16, min=1, help="Requests to prefill, at the most."),
    tokens: int = typer.Option(512, min=1, help="Tokens of each request, at the most."),
    block_size: BlockSize = 16,
    scope: InspectScope = typer.Option(
        InspectScope.BOTH, help="batch: equal positions of different requests; chunk: blocks of one request."
    ),
    chunk_tokens: ChunkTokens = 512,
    text_only: bool = typer.Option(False, "--text-only", help="Say what could be reused by tokens; load no weights."),
    seed: Seed = 0,
    output: Path = typer.Option(Path("out/inspect"), help="Folder for the heat map similarity.png."),
    json: Json = None,
) -> None:
    """Show how alike the KV blocks of real requests are, by layer.

    Requests are prefilled unfused, and pairs of their blocks are compared: cosines, and how many are within an error
    bound. Within one request, blocks at equal places of different chunks are compared, or, when no request is longer
    than a chunk, all its blocks. Also says how many prompt tokens reuse could read instead of computing them, in the
    order of the requests, and how many of those blocks would be beyond the default bounds.
    """
    from jointkv.evaluate.holding.batch import context_of
    from jointkv.evaluate.predict.reuse import by_audits, from_tokens
    from jointkv.evaluate.request_files import prompts_of, read_requests
    from jointkv.evaluate.traffic import get_traffic
    from jointkv.hf.models import load_tokenizer
    from jointkv.policy import FusionPolicy
    from jointkv.theory.licence import Licence

    if chunk_tokens % block_size:
        raise BadInput(f"chunk_tokens: {chunk_tokens} is no multiple of the block size {block_size}")
    if not text_only:
        make_folder(output)
    given = [] if data is None else read_requests(data, requests)
    kind = get_traffic(traffic) if data is None else None
    loaded = None
    if text_only:
        locate(model)
        tokenizer = load_tokenizer(model)
    else:
        loaded, tokenizer = load(model)
    prompts: Sequence[Sequence[int]] = prompts_of(tokenizer, given)
    if kind is not None:
        made = kind.requests(tokenizer, requests, continuation_tokens=1, seed=seed)
        prompts = [request.prompt for request in made]
    longest = tokens if loaded is None else min(tokens, context_of(loaded) or tokens)
    rows = [list(prompt[:longest]) for prompt in prompts]
    if not any(len(row) >= block_size for row in rows):
        raise BadInput(f"no request fills a block of {block_size} tokens; give longer ones or a smaller --block-size")
    described = _described(model, data or traffic, rows, block_size, chunk_tokens)
    described["reuse"] = {"tokens": from_tokens(rows, block_size)}
    if loaded is None:
        write_json(json, described)
        if json != "-":
            _print_reuse(described["reuse"])
        return
    batch = _prefilled(loaded, rows, block_size)
    found = _measure(loaded, batch, chunk_tokens, scope)
    described["reuse"]["audits"] = by_audits(batch, rows, FusionPolicy.preset("safe"), Licence())
    image = output / "similarity.png"
    write_json(json, {**described, "image": image, "rows": [row.as_row() for row in found]})
    if json != "-":
        _print_tables(found, described["within"])
        _print_reuse(described["reuse"])
    _draw(found, image, described)
    wrote(image)


def _prefilled(model: "PreTrainedModel", rows: Sequence[Sequence[int]], block_size: int) -> "Prefilled":
    from jointkv.evaluate.predict.similarity import prefill_rows

    with stages(f"prefilling {len(rows)} requests") as show:
        return prefill_rows(model, rows, block_size, _counted(show, "prefilled request", len(rows)))


def _measure(
    model: "PreTrainedModel", batch: "Prefilled", chunk_tokens: int, scope: InspectScope
) -> "list[Similarity]":
    from jointkv.evaluate.predict.similarity import RELATIONS, similarities
    from jointkv.hf.identity import full_attention_layers

    chosen = {InspectScope.BATCH: RELATIONS[:1], InspectScope.CHUNK: RELATIONS[1:], InspectScope.BOTH: RELATIONS}
    layers = full_attention_layers(model)
    with stages(f"comparing {len(layers)} layers") as show:
        compared = _counted(show, "compared layer", len(layers))
        found = similarities(batch, chunk_tokens, chosen[scope], layers=layers, progress=compared)
    if not any(row.pairs for row in found):
        raise BadInput("no two blocks to compare; give more or longer requests, or another --scope")
    return found


def _described(
    model: str, source: Path | str, rows: Sequence[Sequence[int]], block_size: int, chunk_tokens: int
) -> dict[str, Any]:
    single = all(len(row) // block_size * block_size <= chunk_tokens for row in rows)
    return {
        "model": model,
        "source": source,
        "requests": len(rows),
        "tokens": sum(len(row) for row in rows),
        "block_size": block_size,
        "within": "all blocks of a request" if single else f"equal places of chunks of {chunk_tokens} tokens",
    }


def _counted(show: Callable[[str], None], what: str, total: int) -> Callable[[int], None]:
    every = -(-total // STAGE_LINES)

    def progress(done: int) -> None:
        if done % every == 0 or done == total:
            show(f"{what} {done} of {total}")

    return progress


def _draw(found: "Sequence[Similarity]", image: Path, described: dict[str, Any]) -> None:
    require("matplotlib")
    from jointkv.report.pictures.similarity import draw_similarity

    # Only the last part of a path, or a long one would not fit the picture.
    model, source = (Path(str(described[name])).name for name in ("model", "source"))
    title = (
        f"{model}: {described['requests']} requests ({source}), blocks of {described['block_size']} tokens\n"
        f"across: equal positions of different requests; within: {described['within']}"
    )
    draw_similarity(found, image, title)


def _print_tables(found: "Sequence[Similarity]", within: str) -> None:
    titles = {"across": "Across requests: blocks at equal positions", "within": f"Within a request: {within}"}
    for relation, title in titles.items():
        chosen = [row for row in found if row.relation == relation]
        if chosen:
            stdout_console(100).print(_table(chosen, title), "")


def _print_reuse(reuse: "dict[str, Reusable]") -> None:
    console = stdout_console(80)
    found = reuse["tokens"]
    console.print(
        f"Reuse, from tokens alone: {found.share:.1%} of {found.tokens} prompt tokens could be read behind a text of "
        f"their own instead of being computed, and {found.exact_tokens / found.tokens:.1%} as an exact prefix; "
        f"{found.moved_share:.1%} more are resident at other positions.",
        highlight=False,
    )
    if "audits" in reuse:
        console.print(_audited(reuse["audits"]), highlight=False)


def _audited(found: "Reusable") -> str:
    if not found.runs:
        return "With this model: nothing, by entry blocks and witnesses under the default bounds."
    return (
        f"With this model: {found.share:.1%}, by entry blocks and witnesses under the default bounds; "
        f"{found.missed_blocks} of {found.blocks} blocks beyond them, at most {found.miss_limit:.1%} (95% confidence "
        f"after {found.runs} runs)."
    )


def _table(found: "Sequence[Similarity]", title: str) -> Table:
    from jointkv.evaluate.predict.similarity import ERROR_BOUNDS, SIDES

    pairs = max(row.pairs for row in found)
    caption = "cosine: mean, median, 99th percentile\n≤ e: share of pairs within relative error e"
    table = Table(title=f"{title} ({pairs} pairs per layer)", caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for letter in "KV":
        for name in ("mean", "p50", "p99", *(f"≤{bound:g}" for bound in ERROR_BOUNDS)):
            table.add_column(f"{letter}\n{name}", justify="right", no_wrap=True)
    by_layer = {(row.layer, row.side): row for row in found}
    for layer in sorted({row.layer for row in found}):
        rows = [by_layer[layer, side] for side in SIDES]
        numbers = [(row.mean, row.p50, row.p99, *row.share_within) for row in rows]
        table.add_row(str(layer), *(_number(value) for side in numbers for value in side))
    return table


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
