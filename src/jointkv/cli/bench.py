"""`jointkv bench`: the same requests through real servers with and without fusion, paired and repeated."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from jointkv.cli.console import Cell, cells, named_errors, print_table, progress, stages, stderr_console, write_json
from jointkv.cli.fusion_options import fusion_options
from jointkv.cli.options import FORMATS, SEEDS, Json
from jointkv.cli.vllm_installed import require_vllm

if TYPE_CHECKING:
    from jointkv.bench.options import Model, Options
    from jointkv.bench.result import ServingResult

FAILED, INTERRUPTED = 1, 130
KEPT = "finished runs are kept in {}; the same command goes on with them"
SCORED: Mapping[str, Cell] = {
    "arm": "{row.arm}",
    "KL": "{row.kl:.2g}",
    "worst request": "{row.kl_worst_request:.2g}",
    "top-1": "{row.top1:.1%}",
    "top-1, worst request": "{row.top1_worst_request:.1%}",
    "pages freed": "{row.pages_freed}",
}
TRUE: Mapping[str, Cell] = {"arm": "{row.arm}", "load": "{row.load}", "F1": "{row.f1:.3f}", "answers": "{row.answers}"}
SHOWN = ("ttft_p50", "ttft_p95", "ttft_p99", "output_tokens_per_s", "itl_p50", "e2el_p95", "prompt_tokens_computed")


def register(app: typer.Typer) -> None:
    """Add the verb `bench` to `app`."""
    group = typer.Typer(no_args_is_help=True, help="Compare a serving engine with and without fusion.")
    group.callback()(lambda: None)
    group.command()(serve)
    app.add_typer(group, name="bench")


def serve(
    context: typer.Context,
    quick: bool = typer.Option(
        False, "--quick", help="A first look within minutes: few requests, a small pool, one round, unless given."
    ),
    model: str = typer.Option("smollm2", help="Known name, local folder or hub name."),
    traffic: str = typer.Option(
        "near_prefix", help="Kind of requests: one of jointkv's, dataset:NAME, or vLLM's random and prefix_repetition."
    ),
    data: Path | None = typer.Option(None, help=f"Your requests instead. {FORMATS}"),
    replay: Path | None = typer.Option(None, help="Likewise, at the times of their timestamp field."),
    speed: str | None = typer.Option(None, metavar="X[,X...]", help="Replay this many times as fast. Default 1."),
    concurrency: str | None = typer.Option(
        None, metavar="N[,N...]", help="Closed loop: requests under way at once. Default: all that may run."
    ),
    one_first: bool = typer.Option(
        False, "--one-first", help="One request alone until its first token, then all others at once."
    ),
    rate: str | None = typer.Option(None, metavar="X[,X...]", help="Open loop: requests per second, Poisson."),
    burstiness: str | None = typer.Option(
        None, metavar="X[,X...]", help="Shape of the gaps at each rate: 1 is Poisson, below it they come in bursts."
    ),
    arm: list[str] | None = typer.Option(
        None,
        metavar="NAME | NAME=ARM [KEY=VALUE...] [--FLAG...]",
        help="stock, fused, reuse, large_pool, reuse_large_pool, no_prefix_caching, fp8, fp8_fused, store, "
        "layer_groups, both, paper, or one of these with options of the plugin and flags of vLLM: 'tight=fused "
        "max_relative_error=0.1'. May be repeated. "
        "(default: stock and fused)",
    ),
    flags: str | None = typer.Option(None, help="Further flags of vLLM for all arms, in one string."),
    requests: int | None = typer.Option(None, min=1, help="Default 32; of a log all."),
    warmup: int = typer.Option(
        0, min=0, help="Requests of the same kind served before every run and not measured: donors, and a licence."
    ),
    output_tokens: int | None = typer.Option(
        None, min=1, help="Tokens generated for every request. Default 96, or what a file says."
    ),
    pool_blocks: int = typer.Option(200, min=2, help="Blocks in the KV pool; 8 times as many in a large pool."),
    block_size: int | None = typer.Option(None, min=1, help="Tokens per KV block. Default 32, or the profile's."),
    repeats: int = typer.Option(3, min=1, max=16, help="Rounds; each runs every arm, with the same requests."),
    max_running: int = typer.Option(64, min=1, help="Requests the engine may run at once."),
    max_batched_tokens: int = typer.Option(2048, min=1, help="Tokens the engine may compute in one step."),
    eager: bool = typer.Option(True, "--eager/--compile", help="Whether vLLM runs the model as it is, or compiled."),
    max_relative_error: float | None = typer.Option(None, help="Error bound of the arms that fuse."),
    min_pool_usage: float | None = typer.Option(None, help="Pool usage from which they merge."),
    profile: Path | None = typer.Option(None, help="What `jointkv calibrate` wrote, for the arms that fuse."),
    option: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Any option of the plugin, for the arms that fuse; may be repeated."
    ),
    dtype: str = typer.Option("auto", help="bfloat16, float16, float32; auto is bfloat16 where that is fast."),
    seed: int = typer.Option(0, help="Seed of the requests, and of the arrivals of the first round.", **SEEDS),
    server_cores: str | None = typer.Option(
        None, metavar="0-2,4", help="Cores of the server. Default: all but the last of four and more, else all."
    ),
    client_cores: str | None = typer.Option(
        None, metavar="3", help="Cores of the load generator. Default: those the server leaves, else all."
    ),
    port: int = typer.Option(0, min=0, max=65535, help="Port of the server. Default: one that is free."),
    start_timeout: float = typer.Option(600.0, min=1.0, help="Seconds that the start of a server may take."),
    score: int = typer.Option(
        0,
        min=0,
        metavar="N",
        help="After the runs have an engine of every arm give the reference arm's answers to the first N requests, for "
        "KL, top-1 and the worst request.",
    ),
    fresh: bool = typer.Option(False, "--fresh", help="Start anew: remove the runs that are in the output folder."),
    output: Path = typer.Option(Path("out/serving"), help="Folder for serving.json, runs and logs."),
    json: Json = None,
) -> None:
    """Compare real vLLM servers with and without fusion.

    All serve the same requests. Arms take turns, in another order each round; every arm of a round has a server of its
    own, the same memory, cores and seeds, and all loads. A benchmark that was interrupted goes on where it stopped when
    the same command is given again.
    """
    given = dict(locals())  # most of them go on to `Options` under their own names
    with named_errors():
        from jointkv.bench.options import QUICK

        if quick:
            given |= {name: value for name, value in QUICK.items() if not _was_given(context, name)}
        output = given["output"]
        result = _run(_options(given), output, port, start_timeout, fresh, score)
        write_json(json, result.model_dump())
    if json != "-":
        _print(result)
    file = output / "serving.json"
    _say(f"wrote {file}; the report: jointkv report html {shlex.quote(str(file))}")


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _options(given: dict[str, Any]) -> Options:
    """Raises `BadInput` for what can be told without the model."""
    from jointkv.bench.arms import DEFAULT_ARMS, split_words
    from jointkv.bench.options import Options, default_block_size, engine_dtype

    fusion = {name: given[name] for name in ("max_relative_error", "min_pool_usage")}
    flags = given["flags"] or ""
    fusion["profile"] = None if given["profile"] is None else str(given["profile"])
    return Options(
        **{field.name: given[field.name] for field in fields(Options) if field.name in given}
        | {
            "arms": tuple(given["arm"] or DEFAULT_ARMS),
            "flags": tuple(split_words(flags, f"--flags {flags!r}")),
            "block_size": given["block_size"] or default_block_size(given["profile"]),
            "fusion": fusion_options(given["option"] or [], fusion, "--set", "auto"),
            "dtype": engine_dtype(given["dtype"]),
        }
    )


def _run(options: Options, output: Path, port: int, start_timeout: float, fresh: bool, score: int) -> ServingResult:
    """Raises `typer.Exit` when a server or a load fails, and on Ctrl-C; the runs before that are kept."""
    require_vllm()
    from jointkv.bench import options as options_
    from jointkv.bench.divergence import with_divergences
    from jointkv.bench.environment import server_environment
    from jointkv.bench.load_generator import LoadFailed
    from jointkv.bench.measure import measure
    from jointkv.bench.run import run_plan, server_starter, steps_left
    from jointkv.bench.run_folder import RunFolder
    from jointkv.bench.scoring import ScoringFailed, require_reference, runner, with_scores
    from jointkv.bench.server import ServerFailed, free_port

    cores, client = options_.server_cores(options), options_.client_cores(options)
    with _interruptible(output):
        with stages(f"preparing {options.model}"):
            model = read_model(options)
            plan = options_.make_plan(options, model, shlex.join(["jointkv", *sys.argv[1:]]))
        if score:
            require_reference(plan)
        folder = RunFolder(output, plan.settings(), fresh)
        if folder.runs:
            _say(f"{output} has {len(folder.runs)} finished runs, which are not repeated")
        environment = server_environment(os.environ, cores, plan.pool_bytes(), Path(model.location).is_dir())
        serve = server_starter(plan, environment, cores, port or free_port(), start_timeout, output / "logs")
        try:
            with progress(len(steps_left(plan, folder))) as steps:
                result = run_plan(plan, folder, serve, partial(measure, client_cores=client), steps)
            if result.divergences is None:
                result = with_divergences(result, plan, folder.outputs, serve, model.tokenizer, stages)
                folder.write_result(result)
            if score:
                result = with_scores(result, plan, runner(os.environ, plan, cores, stages), score)
                folder.write_result(result)
            return result
        except (ServerFailed, LoadFailed, ScoringFailed) as error:
            _say(f"error: {error}", style="red")
            _say(KEPT.format(output), style="red")
            raise typer.Exit(code=FAILED) from None


def read_model(options: Options) -> Model:
    """Fetch the model if need be, and read what a plan needs of it."""
    import torch

    from jointkv.bench.options import Model
    from jointkv.cli.model import describe
    from jointkv.hf.models import KNOWN_MODELS, fetch_model, load_config, load_tokenizer, locate_model

    if options.model in KNOWN_MODELS:
        fetch_model(options.model)
    info = describe(options.model, load_config(options.model))
    return Model(
        location=locate_model(options.model),
        tokenizer=load_tokenizer(options.model),
        max_tokens=info.max_tokens,
        numbers_per_token=info.kv_bytes_per_token // getattr(torch, info.dtype).itemsize,
        layers=info.kv_layers,
    )


@contextmanager
def _interruptible(output: Path) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end what runs inside in order, once; then exit code 130."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Impatience must not cut short the stopping of the server.
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        _say("interrupted; stopping the server")
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        _say(KEPT.format(output))
        raise typer.Exit(code=INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str, style: str = "") -> None:
    stderr_console().print(Text(line, style=style), soft_wrap=True)


def _print(result: ServingResult) -> None:
    ratios: dict[tuple[str, str], dict[str, str]] = {}
    for row in result.comparisons:
        cell = f"{row.median_ratio:.2f} ({row.p:.2g})"
        ratios.setdefault((row.load, f"{row.upper}/{row.lower}"), {})[row.metric] = cell
    title = (
        f"{result.requests} requests of {result.traffic}, {result.output_tokens} tokens out, {result.dtype}: "
        f"median ratio of {result.rounds} round(s), and p"
    )
    lines = [[*names, *(found.get(metric, "-") for metric in SHOWN)] for names, found in ratios.items()]
    print_table(title, ("load", "arms", *SHOWN), lines)
    if ratios:
        smallest = max(row.smallest_p for row in result.comparisons)
        typer.echo(f"with so many rounds p is {smallest:.2g} at best")
    _print_answers(result)


def _print_answers(result: ServingResult) -> None:
    """What was found of the answers, where that was asked for or their truth is known."""
    if result.scores:
        against = result.scores[0].against
        title = f"giving the answers of {against}: KL(reference || arm) in nats, and equal likeliest tokens"
        print_table(title, SCORED, [cells(SCORED, row) for row in result.scores], words=1)
    if result.true_answers:
        print_table("texts beside the true answers", TRUE, [cells(TRUE, row) for row in result.true_answers])
