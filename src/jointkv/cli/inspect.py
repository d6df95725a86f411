"""`jointkv inspect`: how alike the KV blocks of real requests are, layer by layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jointkv.cli.console import named_errors, require, stages, stderr_console, write_json
from jointkv.errors import BadInput

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jointkv.evaluate.predict.similarity import Relation, Similarity

RELATIONS: "dict[str, tuple[Relation, ...]]" = {
    "batch": ("across",),
    "chunk": ("within",),
    "both": ("across", "within"),
}
PIPE_WIDTH = 100
STAGE_LINES = 8
"""Progress messages per stage at the most, for logs."""


class InspectScope(StrEnum):
    """What is compared: different requests, the blocks of one request, or both."""

    BATCH = "batch"
    CHUNK = "chunk"
    BOTH = "both"


def inspect(
    model: str = typer.Option("smollm2", help="Known name, local folder or hub name."),
    data: Path | None = typer.Option(None, help="JSONL file of requests; without it, built-in traffic."),
    traffic: str = typer.Option("near_prefix", help="Without --data: near_prefix, names or unrelated."),
    requests: int = typer.Option(16, min=1, help="Requests to prefill, at the most."),
    tokens: int = typer.Option(512, min=1, help="Tokens of each request, at the most."),
    block_size: int = typer.Option(16, min=1, help="Tokens per KV block."),
    scope: InspectScope = typer.Option(
        InspectScope.BOTH, help="batch: equal positions of different requests; chunk: blocks of one request."
    ),
    chunk_tokens: int = typer.Option(512, min=1, help="Tokens per chunk of a request."),
    seed: int = typer.Option(0, help="Seed of the built-in traffic."),
    output: Path = typer.Option(Path("out/inspect"), help="Folder for the heat map similarity.png."),
    json: str | None = typer.Option(None, metavar="FILE", help="Write the result as JSON; - means stdout."),
) -> None:
    """Prefill real requests unfused and compare their KV blocks: cosines, and pairs within an error bound.

    Within one request, blocks at equal places of different chunks are compared, or, when no request is longer
    than a chunk, all its blocks.
    """
    with named_errors():
        if chunk_tokens % block_size:
            raise BadInput(f"chunk_tokens: {chunk_tokens} is no multiple of the block size {block_size}")
        source = _Source(data, traffic, requests, seed)
        source.check()
        loaded, tokenizer = load(model)
        rows = source.tokenize(tokenizer, min(tokens, _context(loaded, tokens)))
        found = _measure(loaded, rows, block_size, chunk_tokens, RELATIONS[scope])
        described = _described(model, data or traffic, rows, block_size, chunk_tokens)
        image = output / "similarity.png"
        if json is not None:
            write_json(json, {**described, "image": image, "rows": [row.as_row() for row in found]})
        if json != "-":
            _print_tables(found, described["within"])
        _draw(found, image, described)
    stderr_console().print(f"wrote {image}", soft_wrap=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add the verb `inspect` to `app`."""
    app.command()(inspect)


@dataclass(frozen=True)
class _Source:
    """Where the requests come from, and how much of them is wanted."""

    data: Path | None
    traffic: str
    requests: int
    seed: int

    def check(self) -> None:
        """Raises BadInput for a file or a traffic that cannot be used, before a model is loaded."""
        from jointkv.evaluate.request_files import read_requests
        from jointkv.evaluate.traffic import get_traffic

        if self.data is None:
            get_traffic(self.traffic)
        else:
            read_requests(self.data)

    def tokenize(self, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> list[list[int]]:
        """Token ids of every request, cut to `tokens`."""
        from jointkv.evaluate.request_files import prompts_of, read_requests
        from jointkv.evaluate.traffic import get_traffic

        if self.data is None:
            made = get_traffic(self.traffic).requests(tokenizer, self.requests, continuation_tokens=1, seed=self.seed)
            return [list(request.prompt[:tokens]) for request in made]
        return [row[:tokens] for row in prompts_of(tokenizer, read_requests(self.data)[: self.requests])]


def load(
    name: str, attn_implementation: str | None = None, dtype: str = "bfloat16"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a model and its tokenizer, fetching a known one if it is missing, and show the stages.

    Raises `BadInput`, `UnsupportedModel`, `FetchError`, `ChecksumError`.
    """
    with stages(f"loading {name}") as show:
        from jointkv.hf.models import KNOWN_MODELS, fetch_model, load_model

        if name in KNOWN_MODELS:
            fetch_model(name, progress=show)
        return load_model(name, attn_implementation=attn_implementation, dtype=dtype)


def _measure(
    model: "PreTrainedModel",
    rows: Sequence[Sequence[int]],
    block_size: int,
    chunk_tokens: int,
    relations: Sequence["Relation"],
) -> "list[Similarity]":
    from jointkv.evaluate.predict.similarity import prefill_rows, similarities
    from jointkv.hf.pool import full_attention_layers

    if not any(len(row) >= block_size for row in rows):
        raise BadInput(f"no request fills a block of {block_size} tokens; give longer ones or a smaller --block-size")
    with stages(f"prefilling {len(rows)} requests") as show:
        batch = prefill_rows(model, rows, block_size, _counted(show, "prefilled request", len(rows)))
        layers = full_attention_layers(model)
        compared = _counted(show, "compared layer", len(layers))
        found = similarities(batch, chunk_tokens, relations, layers=layers, progress=compared)
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


def _context(model: "PreTrainedModel", unknown: int) -> int:
    text = model.config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None) or unknown


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
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    titles = {"across": "Across requests: blocks at equal positions", "within": f"Within a request: {within}"}
    for relation, title in titles.items():
        chosen = [row for row in found if row.relation == relation]
        if chosen:
            console.print(_table(chosen, title), "")


def _table(found: "Sequence[Similarity]", title: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

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
