"""`jointkv evaluate paper`: the experiments of the paper, in shape, on the model at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from jointkv.cli.console import named_errors, progress, stderr_console, write_json
from jointkv.cli.inspect import load

if TYPE_CHECKING:
    from jointkv.evaluate.paper.result import BatchRow, ChunkRow, GrowthRow, LayerRow, PaperResult

WIDTH = 150


def paper(
    model: str = typer.Option("smollm2", help="Known name, local folder or hub name."),
    part: list[str] | None = typer.Option(None, help="batch, chunk or layers; may be repeated. Default all."),
    dataset: list[str] | None = typer.Option(None, help="Data set of the batches; may be repeated. Default four."),
    threshold: list[float] | None = typer.Option(None, help="Cosine of keys in a batch. Default 0.75 and 0.9."),
    largest: int = typer.Option(128, help="Largest batch; the others are powers of two."),
    prompt_tokens: int = typer.Option(256, help="Tokens of K and V per request, where the data suffices."),
    answer_tokens: int = typer.Option(8, help="True tokens scored, and tokens written for F1."),
    document: list[str] | None = typer.Option(None, help="LongBench data set of the chunks. Default three."),
    documents: int = typer.Option(2, help="Documents of each."),
    chunks: int = typer.Option(8, help="Chunks per document."),
    chunk_tokens: int = typer.Option(512, help="Tokens per chunk."),
    chunk_threshold: list[float] | None = typer.Option(None, help="Cosine in chunks. Default 0.62, 0.7 and 0.8."),
    document_answer_tokens: int = typer.Option(32, help="Longest answer to a document's question."),
    layers_dataset: str = typer.Option("GSM8K", help="Data set of the ratio per layer."),
    layers_requests: int = typer.Option(32, help="Requests of that batch; as many others predict it."),
    block_size: int = typer.Option(16, min=1, help="Tokens per KV block."),
    dtype: str = typer.Option("float32", help="Of the model and its KV cache."),
    seed: int = typer.Option(0, help="Order of the rows of each data set."),
    output: Path = typer.Option(Path("out/evaluate-paper"), help="Folder for paper.json."),
    json: Path | None = typer.Option(None, help="Write the JSON here as well ('-' for stdout)."),
) -> None:
    """Repeat the paper's tables on this model: ratio and F1 against batch size, chunk scope, layers against theory.

    Batches use the preset `paper` (keys decide, shared directions) at fixed thresholds, and `safe` beside it. Every
    row names the source of its data, and whether that stands in for another data set. Fusion happens once, when the
    prompts are complete; ratios are those of the prompts.
    """
    given = {
        **{"datasets": dataset, "thresholds": threshold, "tasks": document, "chunk_thresholds": chunk_threshold},
    }
    with named_errors():
        from jointkv.evaluate.paper.experiments import PARTS, run_paper, steps
        from jointkv.evaluate.paper.result import PaperResult
        from jointkv.evaluate.paper.setup import PaperSettings

        settings = PaperSettings(
            **{name: tuple(values) for name, values in given.items() if values},  # type: ignore[arg-type]
            largest=largest,
            prompt_tokens=prompt_tokens,
            answer_tokens=answer_tokens,
            documents=documents,
            chunks=chunks,
            chunk_tokens=chunk_tokens,
            document_answer_tokens=document_answer_tokens,
            layers_dataset=layers_dataset,
            layers_requests=layers_requests,
            block_size=block_size,
            seed=seed,
        )
        parts = tuple(part or PARTS)
        loaded, tokenizer = load(model, dtype=dtype)
        with progress(steps(settings, parts)) as bar:
            rows = run_paper(loaded, tokenizer, settings, parts, bar.start)
        described = {"parts": parts, **dataclasses.asdict(settings)}
        result = PaperResult(model=model, dtype=dtype, settings=described, **dict(rows))
        write_json(output / "paper.json", result.model_dump())
        if json is not None:
            write_json(json, result.model_dump())
    if str(json) != "-":
        _print(result)
    stderr_console().print(f"wrote {output / 'paper.json'}", soft_wrap=True)


def _print(result: PaperResult) -> None:
    _table(
        "Batch scope: ratio of pages, fidelity and token F1 against batch size (* stand-in)",
        ("data", "policy", "batch", "ratio", "KL", "top-1", "NLL (unfused)", "F1 (unfused)"),
        [_batch_cells(row) for row in result.batch],
    )
    _table(
        "Growth of the ratio with the batch size B: r2 of a + b ln B and of a + b B",
        ("data", "policy", "layers", "sizes", "b ln B", "r2 log", "r2 linear"),
        [_growth_cells(row) for row in result.growth],
    )
    _table(
        "Chunk scope: documents fused within themselves (* stand-in)",
        ("data", "policy", "documents", "ratio", "KL", "top-1", "NLL (unfused)", "score (unfused)", "metric"),
        [_chunk_cells(row) for row in result.chunk],
    )
    _table(
        "Ratio per layer, measured and predicted from other requests",
        ("layer", "threshold", "measured", "Poisson", "tree", "rarefaction", "dispersion p"),
        [_layer_cells(row) for row in result.layers],
    )


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    Console(width=None if Console().is_terminal else WIDTH).print(table)


def _name(row: BatchRow | ChunkRow) -> str:
    return f"{row.dataset}*" if row.stand_in else row.dataset


def _fidelity(row: BatchRow | ChunkRow) -> tuple[str, str, str, str]:
    return f"{row.ratio:.2f}", f"{row.kl:.4f}", f"{row.top1:.3f}", f"{row.nll:.3f} ({row.nll_unfused:.3f})"


def _batch_cells(row: BatchRow) -> tuple[str, ...]:
    return (_name(row), row.label, str(row.batch), *_fidelity(row), f"{row.f1:.3f} ({row.f1_unfused:.3f})")


def _growth_cells(row: GrowthRow) -> tuple[str, ...]:
    fits = ("-" if r2 is None else f"{r2:.3f}" for r2 in (row.r2_log, row.r2_linear))
    layers = "all" if row.ratio == "ratio" else "fused"
    return (row.dataset, row.label, layers, str(row.sizes), f"{row.slope_log:.3f}", *fits)


def _chunk_cells(row: ChunkRow) -> tuple[str, ...]:
    score = f"{row.score:.3f} ({row.score_unfused:.3f})"
    return (_name(row), row.label, str(row.documents), *_fidelity(row), score, row.metric)


def _layer_cells(row: LayerRow) -> tuple[str, ...]:
    return (
        *(str(row.layer), f"{row.threshold:g}", f"{row.measured:.2f}"),
        f"{row.poisson:.2f} ({row.poisson_low:.2f}-{row.poisson_high:.2f})",
        f"{row.tree:.2f}",
        f"{row.rarefaction:.2f} ({row.low:.2f}-{row.high:.2f})",
        "-" if row.dispersion is None else f"{row.dispersion:.2g}",
    )
