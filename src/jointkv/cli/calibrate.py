"""`jointkv calibrate`: from a sample of traffic and a target to a profile."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jointkv.cli.console import named_errors, progress, stderr_console, write_json, write_result
from jointkv.cli.inspect import load
from jointkv.errors import BadInput
from jointkv.system.files import make_folder

if TYPE_CHECKING:
    from jointkv.evaluate.calibrate.run import Calibration, TargetUnmet
    from jointkv.evaluate.traffic.base import Request
    from jointkv.policy.profile import FrontierPoint, Profile

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
    (or `completion`, `response`, `output`), continued by what the model itself would say where that is too short.

    A changed word shows as a token that is off by 0.48 or more. A mean KL can be small while single answers have
    become another request's; --token-limit rules that out, whatever the target.

    An interrupted calibration goes on where it was when the same command is run again. Exit code 1, and no profile:
    the target cannot be met (the settings that were considered are shown), or the held-out half misses it.
    """
    with named_errors():
        from jointkv.evaluate.calibrate.run import TargetUnmet
        from jointkv.evaluate.calibrate.settings import CalibrationSettings
        from jointkv.policy.profile import Target

        output = output.expanduser().absolute()
        if output.is_dir():
            raise BadInput(f"{output} is a folder; --output names a file")
        make_folder(output.parent)
        settings = CalibrationSettings(
            target=Target.parse(target),
            scope=scope,  # type: ignore[arg-type]  # FusionPolicy names a wrong one
            chunk_tokens=chunk_tokens,
            layer_groups=layer_groups,
            block_size=block_size,
            token_limit=token_limit,
            seed=seed,
        )
        folder = work or output.with_name(output.name + ".work")
        with progress(STEPS) as steps:
            calibration, source = _prepare(model, dtype, data, traffic, requests, tokens, settings, folder, steps)
            try:
                profile = _run(calibration, source)
            except TargetUnmet as unmet:
                _report_unmet(unmet, json)
                raise typer.Exit(code=UNMET) from None
        if profile.met:
            write_result(output, profile.to_json())
        if json is not None:
            write_json(json, profile.model_dump())
        calibration.clean()
    if str(json) != "-":
        _print_profile(profile)
    if not profile.met:
        stderr_console().print(
            f"the held-out half misses {target}; nothing was written. More requests help.", style="red"
        )
        raise typer.Exit(code=UNMET)
    stderr_console().print(f"wrote {output}", soft_wrap=True)


def _report_unmet(unmet: TargetUnmet, json: Path | None) -> None:
    if json is not None:
        write_json(json, {"met": False, "frontier": [point.model_dump() for point in unmet.frontier]})
    if str(json) != "-":
        _print_frontier(unmet.frontier)
    stderr_console().print(f"{unmet}; nothing was written", soft_wrap=True)


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
    from jointkv.evaluate.calibrate.run import MIN_HALF, Calibration, too_few
    from jointkv.evaluate.request_files import prompts_of, read_requests
    from jointkv.evaluate.traffic import get_traffic

    settings.policy((0.0,) * settings.layer_groups)
    rows = read_requests(data) if data is not None else []
    if len(rows) > count:
        chosen = random.Random(settings.seed).sample(range(len(rows)), count)
        rows = [rows[index] for index in sorted(chosen)]
    kind = get_traffic(traffic) if data is None else None
    found = len(rows) if kind is None else count
    if found < 2 * MIN_HALF:
        raise too_few(found)
    steps.start(f"loading {model}")
    loaded, tokenizer = load(model, dtype=dtype)
    if kind is not None:
        made = kind.requests(tokenizer, count, continuation_tokens=tokens, seed=settings.seed)
    else:
        prompts = list(zip(prompts_of(tokenizer, rows), (row.answer for row in rows), strict=True))
        check_lengths([len(prompt) for prompt, _ in prompts], tokens, [row.line for row in rows], loaded)
        made = with_continuations(loaded, tokenizer, prompts, tokens, settings.block_size)
    calibration = Calibration(loaded, made, settings, work=folder, progress=steps)
    return calibration, f"traffic {kind.name}" if kind is not None else str(data)


def check_lengths(lengths: Sequence[int], tokens: int, lines: Sequence[int], model: Any) -> None:
    """Raises BadInput when a request is a single token or, with `tokens` after it, longer than the model's context."""
    from jointkv.evaluate.holding.batch import context_of

    context = context_of(model)
    for length, line in zip(lengths, lines, strict=True):
        if length < 2:
            raise BadInput(f"line {line}: a prompt of one token")
        if context is not None and length + tokens > context:
            raise BadInput(f"line {line}: {length} tokens and {tokens} to score; the model reads {context}")


def with_continuations(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[list[int], str | None]], tokens: int, block_size: int
) -> list[Request]:
    """Requests with `tokens` tokens to score: of the answer given and, where that is shorter, what the model adds."""
    from jointkv.evaluate.holding.batch import Batch
    from jointkv.evaluate.holding.fused import OFF, FusedBatch
    from jointkv.evaluate.holding.held import greedy
    from jointkv.evaluate.traffic.base import Request

    told = [
        tuple(tokenizer(answer, add_special_tokens=False)["input_ids"][:tokens]) if answer else ()
        for _, answer in prompts
    ]
    short = [index for index, answer in enumerate(told) if len(answer) < tokens]
    for start in range(0, len(short), AT_ONCE):
        part = short[start : start + AT_ONCE]
        begun = [Request((*prompts[index][0], *told[index]), (), "") for index in part]
        held = FusedBatch(model, Batch(model, begun, block_size).prefilled, OFF)
        for index, said in zip(part, greedy(held, begun, tokens), strict=True):
            told[index] = (*told[index], *said)[:tokens]
    return [
        Request(tuple(prompt), answer, tokenizer.decode(prompt, skip_special_tokens=True))
        for (prompt, _), answer in zip(prompts, told, strict=True)
    ]


def _run(calibration: Calibration, source: str) -> Profile:
    from jointkv.hf.pool import model_identity
    from jointkv.system.machine import versions

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
