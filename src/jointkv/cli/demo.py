"""`jointkv demo`: a real model, three traffics, unfused against `paper` and `safe`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jointkv.cli.console import named_errors, progress, stderr_console, write_json
from jointkv.system.files import make_folder, replace_text

if TYPE_CHECKING:
    from jointkv.evaluate.compare.result import PolicyRow

TRAFFICS = ("near_prefix", "names", "unrelated")


def register(app: typer.Typer) -> None:
    """Add the verb `demo` to `app`."""
    app.command()(demo)


def demo(
    model: str = typer.Option("smollm2", help="Known name, local folder or hub name."),
    requests: int = typer.Option(24, min=2, help="Requests per near-prefix traffic; a third more are unrelated."),
    tokens: int = typer.Option(48, min=1, help="True tokens scored after each prompt."),
    key_threshold: float = typer.Option(0.8, help="Cosine threshold of the `paper` policy."),
    max_relative_error: float = typer.Option(0.2, help="Error bound of the `safe` policy."),
    block_size: int = typer.Option(16, min=1, help="Tokens per KV block."),
    dtype: str = typer.Option("float32", help="Of the model and its KV cache; see below."),
    seed: int = typer.Option(0, help="Seed of the requests."),
    output: Path = typer.Option(Path("out/demo"), help="Folder for demo.json, demo.md and demo.png."),
    json: Path | None = typer.Option(None, help="Write the JSON here as well ('-' for stdout)."),
) -> None:
    """Prefill, fuse and score real requests on a real model, and show memory freed beside fidelity lost.

    Pages and bytes are counted at the allocator. KL, top-1 and NLL compare the distributions over the true next
    tokens with those of the same model unfused, on the same requests. float32 is the default because in bfloat16
    rounding alone moves this small model by more than the fusion that is to be measured.
    """
    with named_errors():
        from jointkv.hf.models import load_model
        from jointkv.policy import FusionPolicy
        from jointkv.report.pictures.demo import draw, markdown

        policies = {
            "safe": FusionPolicy.preset("safe", max_relative_error=max_relative_error),
            "paper": FusionPolicy.preset("paper", key_threshold=key_threshold),
        }
        make_folder(output)
        console = stderr_console()
        console.print(f"loading {model} ...")
        loaded, tokenizer = load_model(model, dtype=dtype)
        settings = {"block_size": block_size, "tokens": tokens, "seed": seed, "requests": requests}
        settings_of_run = {**settings, "dtype": dtype}
        rows = []
        with progress(len(TRAFFICS) * (2 + len(policies))) as steps:
            for row in _rows(loaded, tokenizer, policies, settings, steps.start):
                rows.append(row)
        result = _result(model, rows, policies, settings_of_run)
        write_json(output / "demo.json", result)
        if json is not None:
            write_json(json, result)
        replace_text(output / "demo.md", markdown(rows))
        draw(rows, output / "demo.png")
    if json is None or str(json) != "-":
        _print_table(rows)
    console.print(f"wrote demo.json, demo.md and demo.png to {output}")


def _rows(model: Any, tokenizer: Any, policies: Any, settings: dict[str, int], step: Any) -> Iterator[PolicyRow]:
    from jointkv.evaluate.compare.policies import compare_policies
    from jointkv.evaluate.holding.prefilled import prefill
    from jointkv.evaluate.traffic import get_traffic

    size = settings["block_size"]
    for name in TRAFFICS:
        count = settings["requests"] if name != "unrelated" else settings["requests"] * 4 // 3
        requests = get_traffic(name).requests(
            tokenizer, count, continuation_tokens=settings["tokens"], seed=settings["seed"]
        )
        step(f"{name}: prefill of {count} requests")
        batch = prefill(model, requests, block_size=size)
        yield from compare_policies(model, batch, policies, name, step)


def _result(model: str, rows: list[PolicyRow], policies: Any, settings: dict[str, Any]) -> dict[str, Any]:
    import dataclasses
    import platform

    import torch
    import transformers

    import jointkv

    return {
        "format": "jointkv.demo/1",
        "model": model,
        "settings": settings,
        "policies": {name: dataclasses.asdict(policy) for name, policy in policies.items()},
        "versions": {
            "jointkv": jointkv.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "rows": [row.model_dump() for row in rows],
    }


def _print_table(rows: list[PolicyRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="KV pages at the allocator, and next-token fidelity against the unfused model")
    headings = (
        "traffic",
        "policy",
        "ratio",
        "pages",
        "MB",
        "KL",
        "worst KL",
        "top-1",
        "NLL",
        "fuse s",
        "prefill s",
    )
    for number, name in enumerate(headings):
        table.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.traffic,
            row.policy,
            f"{row.ratio:.2f}",
            f"{row.pages_before} > {row.pages_after}",
            f"{row.bytes_after / 1e6:.0f}",
            f"{row.kl:.4f}",
            f"{row.kl_worst_request:.4f}",
            f"{row.top1:.3f}",
            f"{row.nll:.4f}",
            f"{row.seconds_fuse:.2f}",
            f"{row.seconds_prefill:.1f}",
            end_section=row.policy == "paper",
        )
    Console(width=None if Console().is_terminal else 120).print(table)
