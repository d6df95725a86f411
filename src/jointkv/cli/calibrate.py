"""`jointkv calibrate`: from a sample of traffic and a target to a profile."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jointkv.cli.console import (
    named_errors,
    print_table,
    progress,
    stderr_console,
    stdout_console,
    write_json,
    write_result,
    wrote,
)
from jointkv.cli.loading import load
from jointkv.cli.options import SEEDS, ChunkTokens, Data, Dtype, Json, Model
from jointkv.errors import BadInput
from jointkv.system.files import make_room

if TYPE_CHECKING:
    from jointkv.evaluate.calibrate.settings import CalibrationSettings
    from jointkv.evaluate.request_files import UserRequest
    from jointkv.evaluate.traffic.base import Request, Traffic
    from jointkv.policy.profile import FrontierPoint, Measurement, Prediction, Profile, ReuseEvidence

UNMET = 1
STEPS = 6
AT_ONCE = 8
PROFILE_HEADINGS = ("", "requests", "ratio", "KL", "KL worst request", "top-1", "NLL (unfused)")
FRONTIER_HEADINGS = ("max_relative_error", "predicted ratio", "measured ratio", "KL", "KL worst request")


@named_errors()
def calibrate(
    target: str = typer.Option(..., help="kl=0.005, ratio=2 or relative_error=0.2."),
    data: Data = None,
    traffic: str = typer.Option("near_prefix", help="Without --data: built-in traffic, such as names or unrelated."),
    model: Model = "smollm2",
    output: Path = typer.Option(Path("profile.json"), help="Where the profile goes."),
    requests: int = typer.Option(64, min=1, help="Requests to use; half of them choose, half check."),
    tokens: int = typer.Option(48, min=1, help="Tokens scored after each prompt."),
    audits: int = typer.Option(0, min=0, help="Further requests on which reuse is audited, see above."),
    moved: bool = typer.Option(False, "--moved", help="Also audit text at other positions, for --fuse moved=true."),
    scope: str = typer.Option("batch", help="batch: across requests; chunk: inside one."),
    chunk_tokens: ChunkTokens = 512,
    layer_groups: int = typer.Option(1, min=1, max=4096, help="Groups of layers with thresholds of their own."),
    block_size: int = typer.Option(16, min=1, help="Tokens per KV block, as in the engine to be served."),
    token_limit: float = typer.Option(0.45, min=0.0, help="No token may be off by more; see above."),
    dtype: Dtype = "float32",
    seed: int = typer.Option(0, help="Splits the requests, and makes the built-in traffic.", **SEEDS),
    work: Path | None = typer.Option(None, help="Folder that keeps results in between. Default OUTPUT.work."),
    json: Json = None,
) -> None:
    """Choose thresholds for a target, and check them on other requests.

    Half of the requests choose the thresholds, the other half checks them. What follows a prompt is its field `answer`
    (or `completion`, `response`, `output`), continued by what the model itself would say where that is too short.

    A changed word shows as a token that is off by 0.48 or more. A mean KL can be small while single answers have
    become another request's; --token-limit rules that out, whatever the target.

    Of the held-out half and --audits further requests it is measured what reuse before compute would read, and how much
    of that is beyond the thresholds. 172 without a miss grant a licence at 2% from the first request on. Text at other
    positions has a licence of its own, for which --moved audits the same requests again.

    An interrupted calibration goes on where it was when the same command is run again. Exit code 1, and no profile:
    the target cannot be met (the settings that were considered are shown), or the held-out half misses it.
    """
    from jointkv.evaluate.calibrate.run import Calibration, TargetUnmet
    from jointkv.evaluate.calibrate.settings import CalibrationSettings
    from jointkv.hf.identity import model_identity
    from jointkv.policy.profile import Target
    from jointkv.system.machine import versions

    output = output.expanduser().absolute()
    make_room(output)
    settings = CalibrationSettings(
        target=Target.parse(target),
        scope=scope,  # type: ignore[arg-type]  # FusionPolicy names a wrong one
        chunk_tokens=chunk_tokens,
        layer_groups=layer_groups,
        block_size=block_size,
        token_limit=token_limit,
        moved=moved,
        seed=seed,
    )
    if (audits or moved) and (scope == "chunk" or layer_groups > 1):
        raise BadInput(
            "--audits and --moved are about reuse, which takes scope batch and one layer group; leave them out"
        )
    kind, rows = _sample(data, traffic, requests + audits, settings)
    loaded, tokenizer = load(model, dtype)
    with progress(STEPS) as steps:
        if kind is None:
            made = _scored_requests(loaded, tokenizer, rows, tokens, block_size)
        else:
            made = kind.requests(tokenizer, requests + audits, continuation_tokens=tokens, seed=seed)
        made, further = made[:requests], made[requests:]
        folder = work or output.with_name(output.name + ".work")
        calibration = Calibration(loaded, made, settings, audits=further, work=folder, progress=steps)
        source = str(data) if kind is None else f"traffic {kind.name}"
        try:
            profile = calibration.run(model_identity(loaded), source, versions())
        except TargetUnmet as unmet:
            write_json(json, {"met": False, "frontier": unmet.frontier})
            if json != "-":
                _print_frontier(unmet.frontier)
            stderr_console().print(f"{unmet}; nothing was written", soft_wrap=True)
            raise typer.Exit(code=UNMET) from None
    if profile.met:
        write_result(output, profile.to_json())
    write_json(json, profile)
    calibration.clean()
    if json != "-":
        _print_profile(profile)
    if not profile.met:
        said = f"the held-out half misses {target}; nothing was written. More requests help."
        stderr_console().print(said, style="red")
        raise typer.Exit(code=UNMET)
    wrote(output)


def _sample(
    data: Path | None, traffic: str, count: int, settings: CalibrationSettings
) -> tuple[Traffic | None, list[UserRequest]]:
    """The traffic, or the rows of the file that are used. Raises `BadInput` before anything takes long."""
    from jointkv.evaluate.calibrate.run import MIN_HALF, too_few
    from jointkv.evaluate.request_files import read_requests
    from jointkv.evaluate.traffic import get_traffic

    settings.policy((0.0,) * settings.layer_groups)
    kind = get_traffic(traffic) if data is None else None
    rows = [] if data is None else read_requests(data)
    if len(rows) > count:
        rows = [rows[index] for index in sorted(random.Random(settings.seed).sample(range(len(rows)), count))]
    found = len(rows) if kind is None else count
    if found < 2 * MIN_HALF:
        raise too_few(found)
    return kind, rows


def _scored_requests(
    model: Any, tokenizer: Any, rows: Sequence[UserRequest], tokens: int, block_size: int
) -> list[Request]:
    """Requests with `tokens` tokens to score: of the answer given and, where that is shorter, what the model adds.

    Raises `BadInput` for a request of a single token, or one that is longer than the model's context with its answer.
    """
    from jointkv.evaluate.holding.batch import Batch, context_of
    from jointkv.evaluate.holding.fused import OFF, FusedBatch
    from jointkv.evaluate.holding.held import greedy
    from jointkv.evaluate.request_files import prompts_of
    from jointkv.evaluate.traffic.base import Request

    prompts = [tuple(prompt) for prompt in prompts_of(tokenizer, rows)]
    context = context_of(model)
    for row, prompt in zip(rows, prompts, strict=True):
        if len(prompt) < 2:
            raise BadInput(f"{row.place}: a prompt of one token")
        if context is not None and len(prompt) + tokens > context:
            raise BadInput(f"{row.place}: {len(prompt)} tokens and {tokens} to score; the model reads {context}")
    answers = [
        tuple(tokenizer(row.answer, add_special_tokens=False)["input_ids"][:tokens]) if row.answer else ()
        for row in rows
    ]
    short = [index for index, answer in enumerate(answers) if len(answer) < tokens]
    for start in range(0, len(short), AT_ONCE):
        part = short[start : start + AT_ONCE]
        begun = [Request((*prompts[index], *answers[index]), (), "") for index in part]
        held = FusedBatch(model, Batch(model, begun, block_size).prefilled, OFF)
        for index, said in zip(part, greedy(held, begun, tokens), strict=True):
            answers[index] = (*answers[index], *said)[:tokens]
    return [
        Request(prompt, answer, tokenizer.decode(prompt, skip_special_tokens=True))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _print_profile(profile: Profile) -> None:
    rows: list[tuple[str, ...]] = [("predicted", str(profile.predicted.requests), _interval(profile.predicted))]
    for name, row in (("held out", profile.held_out), ("calibrated on", profile.calibrated)):
        fidelity = (f"{row.top1:.3f}", f"{row.nll:.4f} ({row.nll_unfused:.4f})")
        rows.append((name, str(row.requests), *_measured(row), *fidelity))
    title = f"{profile.target.kind}={profile.target.value:g}, {profile.data.source}"
    print_table(title, PROFILE_HEADINGS, rows, words=1, width=120)
    bounds = _bounds(group.max_relative_error for group in profile.groups)
    tokens = _bounds(group.max_token_error for group in profile.groups)
    stdout_console(120).print(f"max_relative_error {bounds}; max_token_error {tokens}", highlight=False)
    if profile.reuse is not None:
        stdout_console(120).print(_audits(profile.reuse), highlight=False, soft_wrap=True)
        if profile.reuse.moved is not None:
            said = f"text at other positions: {_audits(profile.reuse.moved)}"
            stdout_console(120).print(said, highlight=False, soft_wrap=True)


def _print_frontier(frontier: Sequence[FrontierPoint]) -> None:
    rows = [
        (_bounds(point.max_relative_error), _interval(point.predicted), *_measured(point.measured))
        for point in frontier
    ]
    print_table("settings considered", FRONTIER_HEADINGS, rows, words=0, width=120)


def _audits(reuse: ReuseEvidence) -> str:
    from jointkv.theory.licence import Licence

    found = f"{reuse.missed_blocks} of {reuse.blocks} blocks beyond the bounds in {reuse.audits} audits"
    granted = Licence.from_profile(reuse.evidence).granted
    so = "from the first request on" if granted else "after more audits: at 2% it takes 172 without a miss (--audits)"
    echoes = "" if reuse.echoes else ", new echoes as well"
    return (
        f"reuse would skip {reuse.skipped:.0%} of the prompt tokens (entry blocks up to {reuse.near:g} of the bounds"
        f"{echoes}); "
        f"{found}, at most {reuse.limit:.2%}: licensed {so}"
    )


def _bounds(bounds: Iterable[float]) -> str:
    return ", ".join(f"{bound:g}" for bound in bounds)


def _interval(predicted: Prediction) -> str:
    return f"{predicted.ratio:.2f} ({predicted.low:.2f}-{predicted.high:.2f})"


def _measured(row: Measurement | None) -> tuple[str, str, str]:
    return ("-", "-", "-") if row is None else (f"{row.ratio:.2f}", f"{row.kl:.5f}", f"{row.kl_worst_request:.5f}")
