"""`jointkv evaluate paper`: the experiments of the paper, in shape, on the model at hand."""

from __future__ import annotations

from pathlib import Path

import typer

from jointkv.cli.console import Cell, cells, named_errors, print_table, progress, write_json, wrote
from jointkv.cli.loading import load
from jointkv.cli.options import SEEDS, BlockSize, Dtype, Json, Model
from jointkv.system.files import make_folder

SOURCE: dict[str, Cell] = {
    "data": lambda row: f"{row.dataset}*" if row.stand_in else row.dataset,
    "policy": "{row.label}",
}
FIDELITY: dict[str, Cell] = {
    "ratio": "{row.ratio:.2f}",
    "KL": "{row.kl:.4f}",
    "top-1": "{row.top1:.3f}",
    "NLL (unfused)": "{row.nll:.3f} ({row.nll_unfused:.3f})",
}
TABLES: dict[str, tuple[str, dict[str, Cell]]] = {
    "batch": (
        "Batch scope: ratio of pages, fidelity and token F1 against batch size (* stand-in)",
        {**SOURCE, "batch": "{row.batch}", **FIDELITY, "F1 (unfused)": "{row.f1:.3f} ({row.f1_unfused:.3f})"},
    ),
    "growth": (
        "Growth of the ratio with the batch size B: r2 of a + b ln B and of a + b B",
        {
            "data": "{row.dataset}",
            "policy": "{row.label}",
            "layers": lambda row: "all" if row.ratio == "ratio" else "fused",
            "sizes": "{row.sizes}",
            "b ln B": "{row.slope_log:.3f}",
            "r2 log": lambda row: _number(row.r2_log, ".3f"),
            "r2 linear": lambda row: _number(row.r2_linear, ".3f"),
        },
    ),
    "chunk": (
        "Chunk scope: documents fused within themselves (* stand-in)",
        {
            **SOURCE,
            "documents": "{row.documents}",
            **FIDELITY,
            "score (unfused)": "{row.score:.3f} ({row.score_unfused:.3f})",
            "metric": "{row.metric}",
        },
    ),
    "layers": (
        "Ratio per layer, measured and predicted from other requests",
        {
            "layer": "{row.layer}",
            "threshold": "{row.threshold:g}",
            "measured": "{row.measured:.2f}",
            "Poisson": "{row.poisson:.2f} ({row.poisson_low:.2f}-{row.poisson_high:.2f})",
            "tree": "{row.tree:.2f}",
            "rarefaction": "{row.rarefaction:.2f} ({row.low:.2f}-{row.high:.2f})",
            "dispersion p": lambda row: _number(row.dispersion, ".2g"),
        },
    ),
}
"""By experiment, the table's title and columns."""


@named_errors()
def paper(
    model: Model = "smollm2",
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
    block_size: BlockSize = 16,
    dtype: Dtype = "float32",
    seed: int = typer.Option(0, help="Order of the rows of each data set.", **SEEDS),
    output: Path = typer.Option(Path("out/evaluate-paper"), help="Folder for paper.json."),
    json: Json = None,
) -> None:
    """Repeat the paper's tables on this model.

    Ratio and F1 against batch size, chunk scope, and layers against theory. Batches use the preset `paper` (keys
    decide, shared directions) at fixed thresholds, and `safe` beside it. Every row names the source of its data, and
    whether that stands in for another data set. Fusion happens once, when the prompts are complete; ratios are those of
    the prompts.
    """
    from jointkv.evaluate.paper.experiments import PARTS, run_paper, steps
    from jointkv.evaluate.paper.result import PaperResult
    from jointkv.evaluate.paper.setup import PaperSettings

    given = {"datasets": dataset, "thresholds": threshold, "tasks": document, "chunk_thresholds": chunk_threshold}
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
    loaded, tokenizer = load(model, dtype)
    with progress(steps(settings, parts)) as bar:

        def begin(what: str) -> None:  # by then all that is wrong with the input was said
            make_folder(output)
            bar.start(what)

        rows = run_paper(loaded, tokenizer, settings, parts, begin)
    described = {"parts": parts, **vars(settings)}
    result = PaperResult(model=model, dtype=dtype, settings=described, **dict(rows))
    write_json(output / "paper.json", result)
    write_json(json, result)
    if json != "-":
        for name, (title, columns) in TABLES.items():
            print_table(title, columns, [cells(columns, row) for row in getattr(result, name)], width=150)
    wrote(output / "paper.json")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
