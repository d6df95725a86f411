"""`jointkv inspect`: how alike the KV blocks of real requests are, layer by layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from jointkv.cli.console import named_errors, stages, stderr_console, write_json
from jointkv.cli.generate import load, request_tokens
from jointkv.errors import BadInput

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jointkv.blocks import PagedKV
    from jointkv.evaluate.similarity import Relation, Similarity

PIPE_WIDTH = 100
STAGE_LINES = 8
"""Progress messages per stage at the most, for logs."""


class InspectScope(StrEnum):
    """What is compared: different requests, the blocks of one request, or both."""

    BATCH = "batch"
    CHUNK = "chunk"
    BOTH = "both"


@dataclass(frozen=True)
class Prefilled:
    """K and V of some requests: all layers' pages, per request the pages of its full blocks, layer numbers."""

    kv: "PagedKV"
    tables: list["Tensor"]
    layers: list[int]


def inspect(
    model: str = typer.Option("smollm2", help="Known name, local folder or hub name."),
    data: Path | None = typer.Option(None, help="JSONL file of requests; without it, built-in traffic."),
    traffic: str = typer.Option("near_prefix", help="Built-in traffic: near_prefix, names or unrelated."),
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
        texts = _Source(data, traffic, requests, tokens, seed)
        texts.check()
        loaded, tokenizer = load(model)
        rows = texts.tokenize(tokenizer)
        relations: list[Relation] = [
            *(["across"] if scope is not InspectScope.CHUNK else []),
            *(["within"] if scope is not InspectScope.BATCH else []),
        ]
        found = _measure(loaded, rows, block_size, chunk_tokens, relations)
        longest = max(len(row) for row in rows) // block_size * block_size
        within = "all blocks of a request" if longest <= chunk_tokens else f"chunks of {chunk_tokens} tokens"
        settings = {
            "model": model,
            "source": str(data) if data is not None else traffic,
            "requests": len(rows),
            "tokens": sum(len(row) for row in rows),
            "block_size": block_size,
            "within": within,
        }
        image = output / "similarity.png"
        _draw(found, image, settings)
        if json is not None:
            write_json(json, {**settings, "image": image, "rows": [row.as_row() for row in found]})
    if json != "-":
        _print_tables(found, within)
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
    tokens: int
    seed: int

    def check(self) -> None:
        """Raises BadInput for a file or a traffic that cannot be used, before a model is loaded."""
        from jointkv.evaluate.jsonl import read_requests
        from jointkv.evaluate.traffic import get_traffic

        if self.data is None:
            get_traffic(self.traffic)
        else:
            read_requests(self.data)

    def tokenize(self, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
        """Token ids of every request, cut to `tokens`."""
        from jointkv.evaluate.jsonl import read_requests
        from jointkv.evaluate.traffic import get_traffic

        if self.data is None:
            made = get_traffic(self.traffic).requests(
                tokenizer, self.requests, continuation_tokens=1, seed=self.seed
            )
            return [list(request.prompt[: self.tokens]) for request in made]
        chosen = read_requests(self.data)[: self.requests]
        return [request_tokens(tokenizer, request, chat=False)[: self.tokens] for request in chosen]


def prefill(
    model: "PreTrainedModel",
    rows: Sequence[Sequence[int]],
    block_size: int,
    progress: Callable[[int], None] | None = None,
) -> Prefilled:
    """Prefill every request (token ids) on its own, on the pages of one unfused pool.

    `progress` is called with the number of requests done. Raises `UnsupportedModel`.
    """
    import torch

    from jointkv.hf.cache import JointCache
    from jointkv.hf.pool import JointPool

    pool = JointPool(model, "off", block_size=block_size)
    caches = []
    for done, row in enumerate(rows, start=1):
        caches.append(JointCache(pool))
        ids = torch.tensor([list(row)], device=model.device)
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=caches[-1], use_cache=True, logits_to_keep=1)
        if progress is not None:
            progress(done)
    assert pool.blocks is not None
    tables = [
        cache.tables[0].pages[0, : len(row) // block_size] for cache, row in zip(caches, rows, strict=True)
    ]
    # The pages stay readable after the caches are gone: nothing else allocates from this pool.
    return Prefilled(pool.blocks.kv, tables, pool.full_layers)


def _measure(
    model: "PreTrainedModel",
    rows: Sequence[Sequence[int]],
    block_size: int,
    chunk_tokens: int,
    relations: Sequence["Relation"],
) -> "list[Similarity]":
    from jointkv.evaluate.similarity import similarities

    if not any(len(row) >= block_size for row in rows):
        raise BadInput(
            f"no request fills a block of {block_size} tokens; give longer ones or a smaller --block-size"
        )
    with stages(f"prefilling {len(rows)} requests") as show:
        held = prefill(model, rows, block_size, _counted(show, "prefilled request", len(rows)))
        found = similarities(
            held.kv,
            held.tables,
            chunk_tokens // block_size,
            relations,
            layers=held.layers,
            progress=_counted(show, "compared layer", len(held.layers)),
        )
    if not any(row.pairs for row in found):
        raise BadInput("no two blocks to compare; give more or longer requests, or another --scope")
    return found


def _counted(show: Callable[[str], None], what: str, total: int) -> Callable[[int], None]:
    every = -(-total // STAGE_LINES)

    def progress(done: int) -> None:
        if done % every == 0 or done == total:
            show(f"{what} {done} of {total}")

    return progress


def _draw(found: "Sequence[Similarity]", image: Path, settings: dict[str, object]) -> None:
    from jointkv.report.plots import draw_similarity

    title = (
        f"{settings['model']}: {settings['requests']} requests ({settings['source']}), blocks of "
        f"{settings['block_size']} tokens\nacross: equal positions of different requests; within: {settings['within']}"
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
            console.print(_table(chosen, title))


def _table(found: "Sequence[Similarity]", title: str) -> "Table":
    from rich.table import Table

    from jointkv.evaluate.similarity import ERROR_BOUNDS, SIDES

    pairs = max(row.pairs for row in found)
    caption = "cosine: mean, median, 99th percentile, largest; <=e: share of pairs within relative error e"
    table = Table(title=f"{title} ({pairs} pairs per layer)", caption=caption)
    table.add_column("layer", justify="right")
    for letter in "KV":
        for name in ("mean", "p50", "p99", "max", *(f"<={bound:g}" for bound in ERROR_BOUNDS)):
            table.add_column(f"{letter} {name}", justify="right", no_wrap=True)
    by_layer = {(row.layer, row.side): row for row in found}
    for layer in sorted({row.layer for row in found}):
        rows = [by_layer[layer, side] for side in SIDES]
        numbers = [(row.mean, row.p50, row.p99, row.max, *row.share_within) for row in rows]
        table.add_row(str(layer), *(_number(value) for side in numbers for value in side))
    return table


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
