"""`jointkv calibrate`: from a sample of traffic and a target to a profile."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jointkv.cli.console import named_errors, progress, stderr_console, write_json
from jointkv.cli.inspect import load, request_tokens
from jointkv.errors import BadInput

if TYPE_CHECKING:
    from jointkv.evaluate.calibration import Calibration
    from jointkv.evaluate.traffic.base import Request
    from jointkv.profile import FrontierPoint, Profile

UNMET = 1
STEPS = 6
AT_ONCE = 8


def register(app: typer.Typer) -> None:
    """Add the verb `calibrate` to `app`."""
    app.command()(calibrate)


def calibrate(
    target: str = typer.Option(..., help="kl=0.005, ratio=2 or relative_error=0.2."),
    data: Path | None = typer.Option(None, help="JSONL file of requests, best from your own log."),
    traffic: str = typer.Option("near_prefix", help="Without --data: built-in traffic."),
    model: str = typer.Option("smollm2", help="Known name, local folder or hub name."),
    output: Path = typer.Option(Path("profile.json"), help="Where the profile goes."),
    requests: int = typer.Option(64, min=1, help="Requests to use; half of them choose, half check."),
    tokens: int = typer.Option(48, min=1, help="Tokens scored after each prompt."),
    scope: str = typer.Option("batch", help="batch: across requests; chunk: inside one."),
    chunk_tokens: int = typer.Option(512, min=1, help="Tokens per chunk of a request."),
    layer_groups: int = typer.Option(1, min=1, help="Groups of layers with thresholds of their own."),
    block_size: int = typer.Option(16, min=1, help="Tokens per KV block, as in the engine to be served."),
    token_limit: float = typer.Option(0.45, min=0.0, help="No token may be off by more; see below."),
    dtype: str = typer.Option("float32", help="Of the model and its KV cache."),
    seed: int = typer.Option(0, help="Splits the requests, and makes the built-in traffic."),
    work: Path | None = typer.Option(None, help="Folder that keeps results in between. Default OUTPUT.work."),
    json: Path | None = typer.Option(None, help="Write the profile here as well ('-' for stdout)."),
) -> None:
    """Choose thresholds that meet a target on unseen requests, and predict what they are worth.

    Half of the requests choose the thresholds, the other half checks them. What follows a prompt is its field `answer`
    (or `completion`, `response`, `output`), or else what the model itself continues it with.

    A changed word shows as a token that is off by 0.48 or more. A mean KL can be small while single answers have
    become another request's; --token-limit rules that out, whatever the target.

    An interrupted calibration goes on where it was when the same command is run again. Exit code 1: the target
    cannot be met (the settings that were considered are shown), or the held-out half misses it.
    """
    folder = work or output.with_name(output.name + ".work")
    with named_errors():
        from jointkv.evaluate.calibration import CalibrationSettings, TargetUnmet
        from jointkv.profile import Target

        settings = CalibrationSettings(
            target=Target.parse(target),
            scope=scope,  # type: ignore[arg-type]  # FusionPolicy names a wrong one
            chunk_tokens=chunk_tokens,
            layer_groups=layer_groups,
            block_size=block_size,
            token_limit=token_limit,
            seed=seed,
        )
        with progress(STEPS) as steps:
            calibration, source = _prepare(model, dtype, data, traffic, requests, tokens, settings, folder, steps)
            try:
                profile = _run(calibration, source)
            except TargetUnmet as error:
                unmet: TargetUnmet | None = error
            else:
                unmet = None
        if unmet is not None:
            _print_frontier(unmet.frontier)
            if json is not None:
                write_json(json, {"met": False, "frontier": [point.model_dump() for point in unmet.frontier]})
            stderr_console().print(f"{unmet}; nothing was written to {output}", soft_wrap=True)
            raise typer.Exit(code=UNMET)
        profile.save(output)
        if json is not None:
            write_json(json, profile.model_dump())
    shutil.rmtree(folder, ignore_errors=True)
    if str(json) != "-":
        _print_profile(profile)
    stderr_console().print(f"wrote {output}", soft_wrap=True)
    if not profile.met:
        stderr_console().print(f"the held-out half misses {target}; calibrate on more requests", style="red")
        raise typer.Exit(code=UNMET)


def _prepare(
    model: str,
    dtype: str,
    data: Path | None,
    traffic: str,
    count: int,
    tokens: int,
    settings: Any,
    folder: Path,
    steps: Any,
) -> tuple[Calibration, str]:
    """A calibration ready to run, and what its data is called. Raises `BadInput` before anything takes long."""
    from jointkv.evaluate.calibration import MIN_HALF, Calibration
    from jointkv.evaluate.calibration import policy_of as check_policy
    from jointkv.evaluate.jsonl import read_requests
    from jointkv.evaluate.traffic import get_traffic

    check_policy((0.0,) * settings.layer_groups, settings)
    rows = read_requests(data)[:count] if data is not None else []
    kind = get_traffic(traffic) if data is None else None
    found = len(rows) if kind is None else count
    if found < 2 * MIN_HALF:
        raise BadInput(
            f"{found} requests are too few: the interval needs at least {2 * MIN_HALF}, "
            f"{MIN_HALF} to calibrate and {MIN_HALF} to check"
        )
    steps.start(f"loading {model}")
    loaded, tokenizer = load(model, dtype=dtype)
    if kind is not None:
        made = kind.requests(tokenizer, count, continuation_tokens=tokens, seed=settings.seed)
    else:
        prompts = [(request_tokens(tokenizer, row, chat=False), row.answer) for row in rows]
        check_context([len(prompt) + tokens for prompt, _ in prompts], [row.line for row in rows], loaded)
        made = with_continuations(loaded, tokenizer, prompts, tokens, settings.block_size)
    calibration = Calibration(loaded, made, settings, work=folder, progress=steps)
    return calibration, f"traffic {kind.name}" if kind is not None else str(data)


def check_context(lengths: Sequence[int], lines: Sequence[int], model: Any) -> None:
    """Raises BadInput when a request, with what follows it, is longer than the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    for length, line in zip(lengths, lines, strict=True):
        if context is not None and length > context:
            raise BadInput(f"line {line}: {length} tokens with what follows; the model reads {context}")


def with_continuations(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[list[int], str | None]], tokens: int, block_size: int
) -> list[Request]:
    """Requests with `tokens` tokens to score: of the answer given, or, if that is shorter, what the model says."""
    from jointkv.evaluate.comparison import greedy
    from jointkv.evaluate.held import FusedBatch
    from jointkv.evaluate.methods.base import Batch
    from jointkv.evaluate.traffic.base import Request
    from jointkv.policy import FusionPolicy

    made: dict[int, Request] = {}
    for index, (prompt, answer) in enumerate(prompts):
        told = tokenizer(answer, add_special_tokens=False)["input_ids"][:tokens] if answer else []
        made[index] = Request(tuple(prompt), tuple(told), tokenizer.decode(prompt, skip_special_tokens=True))
    silent = [index for index, request in made.items() if len(request.continuation) < tokens]
    for start in range(0, len(silent), AT_ONCE):
        part = silent[start : start + AT_ONCE]
        batch = Batch(model, [made[index] for index in part], block_size)
        held = FusedBatch(model, batch.prefilled, FusionPolicy.preset("off"), block_size=block_size)
        for index, said in zip(part, greedy(held, batch, tokens), strict=True):
            made[index] = Request(made[index].prompt, said, made[index].text)
    return [made[index] for index in range(len(prompts))]


def _run(calibration: Calibration, source: str) -> Profile:
    from jointkv.bench.machine import versions
    from jointkv.hf.pool import model_identity

    return calibration.run(model_identity(calibration.model), source, versions())


def _print_profile(profile: Profile) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{profile.target.kind}={profile.target.value:g}, {profile.data.source}")
    for heading in ("", "requests", "ratio", "KL", "KL worst request", "top-1", "NLL (unfused)"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    predicted = profile.predicted
    table.add_row(
        "predicted", str(predicted.requests), f"{predicted.ratio:.2f} ({predicted.low:.2f}-{predicted.high:.2f})"
    )
    for name, row in (("held out", profile.held_out), ("calibrated on", profile.calibrated)):
        table.add_row(
            *(name, str(row.requests), f"{row.ratio:.2f}", f"{row.kl:.5f}", f"{row.kl_worst_request:.5f}"),
            *(f"{row.top1:.3f}", f"{row.nll:.4f} ({row.nll_unfused:.4f})"),
        )
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    bounds = ", ".join(f"{group.max_relative_error:g}" for group in profile.groups)
    tokens = ", ".join(f"{group.max_token_error:g}" for group in profile.groups)
    console.print(f"max_relative_error {bounds}; max_token_error {tokens}", highlight=False)


def _print_frontier(frontier: Sequence[FrontierPoint]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="settings considered")
    for heading in ("max_relative_error", "predicted ratio", "measured ratio", "KL", "KL worst request"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in frontier:
        row, measured = point.predicted, point.measured
        table.add_row(
            ", ".join(f"{bound:g}" for bound in point.max_relative_error),
            f"{row.ratio:.2f} ({row.low:.2f}-{row.high:.2f})",
            *(
                ("-", "-", "-")
                if measured is None
                else (f"{measured.ratio:.2f}", f"{measured.kl:.5f}", f"{measured.kl_worst_request:.5f}")
            ),
        )
    Console(width=None if Console().is_terminal else 120).print(table)
