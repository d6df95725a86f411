"""`jointkv evaluate`: fusion and what a user might take instead, on the same requests, with what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jointkv.cli.console import named_errors, progress, stderr_console, write_json
from jointkv.cli.evaluate_curves import curves
from jointkv.cli.evaluate_paper import paper
from jointkv.cli.inspect import load
from jointkv.errors import BadInput
from jointkv.system.files import make_folder

if TYPE_CHECKING:
    from jointkv.evaluate.compare.result import MethodRow, TrafficSummary
    from jointkv.evaluate.tasks.result import TaskRow
    from jointkv.evaluate.traffic.base import Request, Traffic

WORKER = Path(".venv-eval/bin/python")
HEADINGS = ("traffic", "method", "level", "saved", "KL", "worst KL", "top-1", "NLL (unfused)", "common prefix")


def register(app: typer.Typer) -> None:
    """Add the verb `evaluate` to `app`."""
    group = typer.Typer(help="Compare fusion with other ways of holding KV in less memory.")
    group.callback(invoke_without_command=True)(evaluate)
    group.command()(curves)
    group.command()(paper)
    app.add_typer(group, name="evaluate")


def evaluate(
    context: typer.Context,
    model: str = typer.Option("smollm2", help="Known name, local folder or hub name."),
    traffic: list[str] | None = typer.Option(
        None, help="Kind of requests, or dataset:NAME; may be repeated. Default near_prefix, unless there are tasks."
    ),
    method: list[str] | None = typer.Option(
        None, metavar="NAME[@LEVEL]", help="Method, at one level or as many bytes as fusion; may be repeated."
    ),
    policy: list[str] | None = typer.Option(None, help="Fusion under a preset: safe, paper; may be repeated."),
    profile: Path | None = typer.Option(None, help="Fusion under what `jointkv calibrate` wrote."),
    task: list[str] | None = typer.Option(None, "--task", "--tasks", help="Task to score; may be repeated."),
    requests: int = typer.Option(12, min=2, help="Requests per traffic."),
    tokens: int = typer.Option(48, min=1, help="True tokens scored after each prompt."),
    generate: int = typer.Option(0, min=0, help="Tokens to generate, for the common prefix with unfused outputs."),
    examples: int = typer.Option(32, min=2, help="Examples per task."),
    task_batch: int = typer.Option(16, min=1, help="Examples held at once, which may share memory."),
    block_size: int = typer.Option(16, min=1, help="Tokens per KV block."),
    dtype: str = typer.Option("float32", help="Of the model and its KV cache."),
    seed: int = typer.Option(0, help="Seed of the requests."),
    all_levels: bool = typer.Option(False, "--all-levels", help="Methods of any size also run at their own levels."),
    worker: Path = typer.Option(WORKER, help="Python of the environment of the baselines (make setup-eval)."),
    output: Path = typer.Option(Path("out/evaluate"), help="Folder for evaluate.json."),
    json: Path | None = typer.Option(None, help="Write the JSON here as well ('-' for stdout)."),
) -> None:
    """Hold the same requests in less memory in several ways, and compare the next tokens with the unfused model's.

    Without --method, --policy and --profile every method runs: those that can be set to any size at as many bytes as
    fusion takes at its default bound, the others at all their levels. KL, top-1 and NLL are those of the true tokens
    that follow, mean and worst request. Tasks run under the methods that have a level (default: safe and paper).
    """
    if context.invoked_subcommand is not None:
        return
    with named_errors():
        from jointkv.evaluate.compare.result import Evaluation
        from jointkv.evaluate.compare.suite import Suite, choices_of, task_methods
        from jointkv.evaluate.holding.batch import context_of
        from jointkv.evaluate.tasks import get_task
        from jointkv.evaluate.traffic import get_traffic
        from jointkv.hf.models import locate_model
        from jointkv.policy.profile import Profile

        traffics = [get_traffic(name) for name in traffic or ([] if task else ["near_prefix"])]
        tasks = [get_task(name) for name in task or ()]
        loaded_profile = None if profile is None else Profile.load(profile)
        choices = choices_of(method or [], policy or [], None if loaded_profile is None else loaded_profile.policy())
        loaded, tokenizer = load(model, dtype=dtype)
        if loaded_profile is not None:
            from jointkv.hf.pool import model_identity

            loaded_profile.check(model_identity(loaded), block_size)
        context_limit = context_of(loaded)
        described, made = _made(traffics, tokenizer, (requests, tokens, seed), max(tokens, generate), context_limit)
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
        with progress(len(traffics) + len(tasks)) as steps:
            for kind in traffics:
                steps.start(kind.name)
                result.rows.extend(suite.run_traffic(kind, made[kind.name], choices, steps.say))
                # So that an interrupted run has lost the last one only.
                write_json(output / "evaluate.json", result.model_dump())
            for one in tasks:
                steps.start(one.name)
                result.tasks.extend(suite.run_task(one, wanted, examples, task_batch, steps.say))
                write_json(output / "evaluate.json", result.model_dump())
        if json is not None:
            write_json(json, result.model_dump())
    if str(json) != "-":
        _print_rows(result.rows)
        _print_tasks(result.tasks)
    stderr_console().print(f"wrote {output / 'evaluate.json'}", soft_wrap=True)


def _made(
    traffics: Sequence[Traffic], tokenizer: Any, sizes: tuple[int, int, int], added: int, context: int | None
) -> tuple[dict[str, TrafficSummary], dict[str, list[Request]]]:
    """A description of every traffic, and its requests. Raises `BadInput` for a request that the model cannot read."""
    from jointkv.evaluate.compare.result import TrafficSummary

    count, tokens, seed = sizes
    described, made = {}, {}
    for traffic in traffics:
        requests = traffic.requests(tokenizer, count, continuation_tokens=tokens, seed=seed)
        lengths = [len(request.prompt) for request in requests]
        if context is not None and max(lengths) + added > context:
            raise BadInput(f"{traffic.name}: a request takes {max(lengths) + added} tokens; the model reads {context}")
        made[traffic.name] = requests
        described[traffic.name] = TrafficSummary(
            requests=count,
            prompt_tokens={"min": min(lengths), "mean": sum(lengths) / count, "max": max(lengths)},
            description=traffic.description,
        )
    return described, made


def _print_rows(rows: Sequence[MethodRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(title="KV bytes saved at 16 bits, and the next tokens against the unfused model's")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number > 1 else "left", no_wrap=True)
    for row in rows:
        cells = (row.traffic, row.method, f"{row.level:g}")
        if row.not_run is not None:
            table.add_row(*cells, f"not run: {row.not_run[:60]}")
            continue
        table.add_row(
            *cells,
            *(f"{1 - (row.share_16bit or 0):.1%}", f"{row.kl:.5f}", f"{row.kl_worst_request:.4f}", f"{row.top1:.3f}"),
            f"{row.nll:.4f} ({row.nll_reference:.4f})",
            "-" if row.common_prefix is None else f"{row.common_prefix:.1f} of {row.generated}",
        )
    Console(width=None if Console().is_terminal else 140).print(table)


def _print_tasks(rows: Sequence[TaskRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(title="Task scores; difference to the unfused model with 95% interval, paired by request")
    for number, heading in enumerate(("task", "metric", "method", "level", "score", "difference", "saved", "data")):
        table.add_column(heading, justify="right" if 2 < number < 7 else "left")
    for row in rows:
        apart = row.difference
        table.add_row(
            *(row.task, row.metric, row.method, f"{row.level:g}", f"{row.mean:.3f}"),
            "-" if apart is None else f"{apart.mean:+.3f} ({apart.low:+.3f} to {apart.high:+.3f})",
            *(f"{1 - row.share_16bit:.1%}", row.source),
        )
    Console(width=None if Console().is_terminal else 160).print(table)
