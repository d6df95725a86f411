"""`jointkv bench`: the same requests through a serving engine with and without fusion."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jointkv.cli.bench_serve import serve
from jointkv.cli.console import named_errors, progress, require, stages, stderr_console, write_json
from jointkv.cli.engine_options import INTERRUPTED, engine_block_size, engine_dtype
from jointkv.cli.fusion_options import fusion_options
from jointkv.system.files import make_folder, replace_text

if TYPE_CHECKING:
    from jointkv.bench.engine_run import EngineRun, Measured
    from jointkv.bench.quick import ArmSummary, QuickSettings, Sample


def register(app: typer.Typer) -> None:
    """Add the verb `bench` to `app`."""
    group = typer.Typer(no_args_is_help=True, help="Compare a serving engine with and without fusion.")
    group.callback()(lambda: None)
    group.command()(quick)
    group.command()(serve)
    app.add_typer(group, name="bench")


def quick(
    model: str = typer.Option("smollm2", help="Known name, local folder or hub name."),
    traffic: str = typer.Option("near_prefix", help="Kind of requests: near_prefix, names or unrelated."),
    requests: int = typer.Option(48, min=1, help="Requests, all submitted at once."),
    output_tokens: int = typer.Option(96, min=1, help="Tokens generated for every request."),
    pool_blocks: int = typer.Option(200, min=2, help="Blocks in the KV pool; stock_large_pool has 8 times as many."),
    block_size: int | None = typer.Option(None, min=1, help="Tokens per KV block. Default 32, or the profile's."),
    repeats: int = typer.Option(3, min=1, help="Rounds; each has requests of its own, the same for every arm."),
    arm: list[str] | None = typer.Option(None, help="Run this arm only; may be repeated. (default: all)"),
    max_relative_error: float | None = typer.Option(None, help="Error bound of the fused arm."),
    min_pool_usage: float | None = typer.Option(None, help="Pool usage from which the fused arm merges."),
    profile: Path | None = typer.Option(None, help="What `jointkv calibrate` wrote, for the fused arm."),
    option: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Any option of the plugin, for the fused arm; may be repeated."
    ),
    dtype: str = typer.Option("auto", help="bfloat16, float16, float32; auto is bfloat16 where that is fast."),
    seed: int = typer.Option(0, help="Seed of the first round's requests."),
    output: Path = typer.Option(Path("out/bench"), help="Folder for quick.json, quick.md and logs of failed runs."),
    json: Path | None = typer.Option(None, help="Write the JSON here as well ('-' for stdout)."),
) -> None:
    """Serve the same requests with stock vLLM, with fusion, and with stock vLLM and a large KV pool.

    Every run has a process of its own. The arms take turns, in another order each round, on the same cores, with
    prefix caching on. Numbers are medians over rounds; ratios are taken within a round first.
    """
    with named_errors():
        from jointkv.bench.quick import QuickSettings, choose_arms

        given = {
            "max_relative_error": max_relative_error,
            "min_pool_usage": min_pool_usage,
            "profile": None if profile is None else str(profile.expanduser().absolute()),
        }
        settings = QuickSettings(
            model=model,
            traffic=traffic,
            requests=requests,
            output_tokens=output_tokens,
            pool_blocks=pool_blocks,
            block_size=engine_block_size(block_size, profile),
            repeats=repeats,
            arms=tuple(chosen.name for chosen in choose_arms(arm or QuickSettings.arms)),
            dtype=engine_dtype(dtype),
            seed=seed,
            fusion=fusion_options(option or [], given, "--set"),
        )
        try:
            summaries, ratios = _run(settings, output, json)
        except KeyboardInterrupt:
            stderr_console().print("interrupted; the running engine was ended")
            raise typer.Exit(code=INTERRUPTED) from None
    if json is None or str(json) != "-":
        _print_table(summaries, ratios, settings)
    stderr_console().print(f"wrote quick.json and quick.md to {output}")


def _run(
    settings: QuickSettings, output: Path, json: Path | None
) -> tuple[list[ArmSummary], dict[str, dict[str, float | None]]]:
    from jointkv.bench import quick as bench
    from jointkv.report.quick_table import markdown

    make_folder(output)
    location, rounds, kv_bytes_per_token = _prepare(settings)
    with progress(len(rounds) * len(settings.arms)) as steps:
        launch = _launcher(settings, location, kv_bytes_per_token, output)
        samples = bench.run_quick(settings, location, rounds, launch, steps)
    summaries, ratios = bench.summarise(settings, samples), bench.ratios(samples)
    document = _document(settings, rounds, samples, summaries, ratios)
    write_json(output / "quick.json", document)
    if json is not None:
        write_json(json, document)
    replace_text(output / "quick.md", markdown(summaries, ratios))
    return summaries, ratios


def _prepare(settings: QuickSettings) -> tuple[str, list[list[list[int]]], int]:
    """The model's folder or hub name, the prompts of every round, and what a token's KV costs."""
    import torch

    from jointkv.bench.quick import check_fit
    from jointkv.cli.model import describe
    from jointkv.evaluate.traffic import get_traffic

    traffic = get_traffic(settings.traffic)
    require("vllm")
    from jointkv.hf.models import KNOWN_MODELS, fetch_model, load_config, load_tokenizer, locate_model

    with stages(f"preparing {settings.model}") as show:
        if settings.model in KNOWN_MODELS:
            fetch_model(settings.model, progress=show)
        info = describe(settings.model, load_config(settings.model))
        tokenizer = load_tokenizer(settings.model)
        seeds = range(settings.seed, settings.seed + settings.repeats)
        rounds = [
            [
                list(request.prompt)
                for request in traffic.requests(tokenizer, settings.requests, continuation_tokens=1, seed=seed)
            ]
            for seed in seeds
        ]
    for prompts in rounds:
        check_fit(settings, prompts, info.max_tokens)
    bytes_per_number = getattr(torch, settings.dtype).itemsize
    numbers_per_token = info.kv_bytes_per_token // getattr(torch, info.dtype).itemsize
    return locate_model(settings.model), rounds, numbers_per_token * bytes_per_number


def _launcher(
    settings: QuickSettings, location: str, kv_bytes_per_token: int, output: Path
) -> Callable[[str, EngineRun, Callable[[int], None]], Measured]:
    from jointkv.bench.launch import engine_environment, launch
    from jointkv.bench.quick import choose_arms
    from jointkv.system.machine import allowed_cores

    largest = max(arm.pool_factor for arm in choose_arms(settings.arms))
    kv_bytes = largest * settings.pool_blocks * settings.block_size * kv_bytes_per_token
    environment = engine_environment(os.environ, allowed_cores(), kv_bytes, Path(location).is_dir())

    def run(name: str, engine_run: EngineRun, finished: Callable[[int], None]) -> Measured:
        return launch(engine_run, environment, finished, output / f"quick-{name}.log")

    return run


def _document(
    settings: QuickSettings,
    rounds: list[list[list[int]]],
    samples: list[Sample],
    summaries: list[ArmSummary],
    ratios: dict[str, dict[str, float | None]],
) -> dict[str, Any]:
    import dataclasses

    from jointkv.bench.quick import FORMAT
    from jointkv.system.machine import machine, versions
    from jointkv.vllm_plugin.settings import PluginSettings

    lengths = [len(prompt) for prompts in rounds for prompt in prompts]
    return {
        "format": FORMAT,
        "settings": settings,
        "fusion_settings": PluginSettings.parse(dict(settings.fusion)).model_dump(),
        "prompt_tokens": {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)},
        "versions": versions(),
        "machine": machine(),
        "samples": [
            {
                **{name: value for name, value in vars(sample).items() if name != "measured"},
                **dataclasses.asdict(sample.measured),
            }
            for sample in samples
        ],
        "summary": summaries,
        "ratios": ratios,
    }


def _print_table(
    summaries: list[ArmSummary], ratios: dict[str, dict[str, float | None]], settings: QuickSettings
) -> None:
    from rich.console import Console
    from rich.table import Table

    from jointkv.report.quick_table import HEADINGS, cells, ratio_lines

    table = Table(
        title=f"{settings.requests} {settings.traffic} requests, {settings.output_tokens} tokens out, "
        f"{settings.dtype}, medians of {settings.repeats} round(s)"
    )
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for summary in summaries:
        table.add_row(*cells(summary))
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    for line in ratio_lines(ratios):
        console.print(line, highlight=False, soft_wrap=True)
