"""`jointkv evaluate`: fusion and what a user might take instead, on the same requests, with what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from jointkv.cli.console import Cell, cells, named_errors, print_table, progress, write_json, wrote
from jointkv.cli.evaluate_curves import curves
from jointkv.cli.evaluate_frontier import frontier
from jointkv.cli.evaluate_paper import paper
from jointkv.cli.evaluate_reuse import reuse
from jointkv.cli.loading import load
from jointkv.cli.options import BlockSize, Dtype, Json, Model, ScoredTokens, Seed
from jointkv.errors import BadInput
from jointkv.system.files import make_folder

if TYPE_CHECKING:
    from jointkv.evaluate.compare.result import Evaluation, TrafficSummary
    from jointkv.evaluate.traffic.base import Request, Traffic

WORKER = Path(".venv-eval/bin/python")
INTERVAL = "{0.mean:+.3f} ({0.low:+.3f} to {0.high:+.3f})"
COLUMNS: dict[str, Cell] = {
    "traffic": "{row.traffic}",
    "method": "{row.method}",
    "level": "{row.level:g}",
    "saved": lambda row: f"{1 - (row.share_16bit or 0):.1%}",
    "skipped": lambda row: "-" if row.work is None else f"{row.work.skipped_share:.1%}",
    "beyond": lambda row: "-" if row.work is None or row.work.missed_share is None else f"{row.work.missed_share:.2%}",
    "KL": "{row.kl:.5f}",
    "worst KL": "{row.kl_worst_request:.4f}",
    "top-1": "{row.top1:.3f}",
    "NLL (unfused)": "{row.nll:.4f} ({row.nll_reference:.4f})",
    "common prefix": lambda row: "-" if row.common_prefix is None else f"{row.common_prefix:.1f} of {row.generated}",
    "diverged": lambda row: "-" if row.diverged is None else f"{row.diverged:.0%}",
}
TASK_COLUMNS: dict[str, Cell] = {
    "task": "{row.task}",
    "metric": "{row.metric}",
    "method": "{row.method}",
    "level": "{row.level:g}",
    "score": "{row.mean:.3f}",
    "difference": lambda row: "-" if row.difference is None else INTERVAL.format(row.difference),
    "skipped": lambda row: "-" if row.work is None else f"{row.work.skipped_share:.1%}",
    "saved": lambda row: f"{1 - row.share_16bit:.1%}",
    "data": "{row.source}",
}


def register(app: typer.Typer) -> None:
    """Add the verb `evaluate` to `app`."""
    group = typer.Typer(help="Compare fusion with other ways of holding KV in less memory.")
    group.callback(invoke_without_command=True)(evaluate)
    group.command()(curves)
    group.command()(frontier)
    group.command()(paper)
    group.command()(reuse)
    app.add_typer(group, name="evaluate")


@named_errors()
def evaluate(
    context: typer.Context,
    model: Model = "smollm2",
    traffic: list[str] | None = typer.Option(
        None, help="Kind of requests, or dataset:NAME; may be repeated. Default near_prefix, unless there are tasks."
    ),
    method: list[str] | None = typer.Option(
        None, metavar="NAME[@LEVEL]", help="Method, at one level or as many bytes as fusion; may be repeated."
    ),
    policy: list[str] | None = typer.Option(None, help="Fusion under a preset: safe, paper; may be repeated."),
    profile: Path | None = typer.Option(None, help="Fusion, and reuse, under what `jointkv calibrate` wrote."),
    task: list[str] | None = typer.Option(None, "--task", "--tasks", help="Task to score; may be repeated."),
    requests: int = typer.Option(12, min=2, help="Requests per traffic."),
    tokens: ScoredTokens = 48,
    generate: int = typer.Option(0, min=0, help="Tokens to generate, for the common prefix with unfused outputs."),
    examples: int = typer.Option(32, min=2, help="Examples per task."),
    task_batch: int = typer.Option(16, min=1, help="Examples held at once, which may share memory."),
    block_size: BlockSize = 16,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    all_levels: bool = typer.Option(False, "--all-levels", help="Methods of any size also run at their own levels."),
    worker: Path = typer.Option(WORKER, help="Python of the environment of the baselines (make setup-eval)."),
    output: Path = typer.Option(Path("out/evaluate"), help="Folder for evaluate.json."),
    json: Json = None,
) -> None:
    """Hold the same requests in less memory in several ways, and compare the next tokens with the unfused model's.

    Without --method, --policy and --profile every method runs: those that can be set to any size at as many bytes as
    fusion takes at its default bound, the others at all their levels. KL, top-1 and NLL are those of the true tokens
    that follow, mean and worst request. Tasks run under the methods that have a level (default: safe and paper).
    """
    if context.invoked_subcommand is not None:
        return
    from jointkv.evaluate.compare.result import Evaluation
    from jointkv.evaluate.compare.suite import Suite, choices_of, task_methods
    from jointkv.evaluate.holding.batch import context_of
    from jointkv.evaluate.tasks import get_task
    from jointkv.evaluate.traffic import get_traffic
    from jointkv.hf.identity import model_identity
    from jointkv.hf.models import locate_model
    from jointkv.policy.profile import Profile

    traffics = [get_traffic(name) for name in traffic or ([] if task else ["near_prefix"])]
    tasks = [get_task(name) for name in task or ()]
    fitted = None if profile is None else Profile.load(profile)
    choices = choices_of(method or [], policy or [], fitted)
    loaded, tokenizer = load(model, dtype)
    if fitted is not None:
        fitted.check(model_identity(loaded), block_size)
    made = [kind.requests(tokenizer, requests, continuation_tokens=tokens, seed=seed) for kind in traffics]
    described = _described(traffics, made, max(tokens, generate), context_of(loaded))
    wanted = task_methods(choices) if tasks else []
    make_folder(output)
    suite = Suite(
        loaded, tokenizer, Path(locate_model(model)), worker, block_size, generate, all_levels=all_levels, seed=seed
    )
    settings = {
        **{"requests": requests, "tokens": tokens, "generate": generate, "block_size": block_size, "seed": seed},
        **{"examples": examples, "task_batch": task_batch},
    }
    result = Evaluation(model=model, dtype=dtype, settings=settings, traffics=described, rows=[], tasks=[])
    # Written after each part, so that an interrupted run has lost the last one only.
    with progress(len(traffics) + len(tasks)) as steps:
        for kind, part in zip(traffics, made, strict=True):
            steps.start(kind.name)
            result.rows.extend(suite.run_traffic(kind, part, choices, steps.say))
            write_json(output / "evaluate.json", result)
        for one in tasks:
            steps.start(one.name)
            result.tasks.extend(suite.run_task(one, wanted, examples, task_batch, steps.say))
            write_json(output / "evaluate.json", result)
    write_json(json, result)
    if json != "-":
        _print(result)
    wrote(output / "evaluate.json")


def _described(
    traffics: Sequence[Traffic], made: Sequence[Sequence[Request]], added: int, context: int | None
) -> dict[str, TrafficSummary]:
    """A description of every traffic. Raises `BadInput` for a request that the model cannot read."""
    from jointkv.evaluate.compare.result import TrafficSummary

    described = {}
    for traffic, requests in zip(traffics, made, strict=True):
        lengths = [len(request.prompt) for request in requests]
        if context is not None and max(lengths) + added > context:
            raise BadInput(f"{traffic.name}: a request takes {max(lengths) + added} tokens; the model reads {context}")
        described[traffic.name] = TrafficSummary(
            requests=len(requests),
            prompt_tokens={"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)},
            description=traffic.description,
        )
    return described


def _print(result: Evaluation) -> None:
    lines = [
        cells(COLUMNS, row)
        if row.not_run is None
        else [row.traffic, row.method, f"{row.level:g}", f"not run: {row.not_run[:60]}"]
        for row in result.rows
    ]
    print_table("KV bytes saved at 16 bits, and the next tokens against the unfused model's", COLUMNS, lines)
    lines = [cells(TASK_COLUMNS, row) for row in result.tasks]
    title = "Task scores; difference to the unfused model with 95% interval, paired by request"
    print_table(title, TASK_COLUMNS, lines, words=3, width=160)
