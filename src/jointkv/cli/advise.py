"""`jointkv advise`: what a log of requests could reuse, what breaks its prefixes, and what to change."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from jointkv.cli.console import named_errors, require, stages, stdout_console, write_json, wrote
from jointkv.cli.loading import locate
from jointkv.cli.options import FORMATS, BlockSize, Json, Model
from jointkv.system.files import make_folder, replacing

if TYPE_CHECKING:
    from jointkv.evaluate.advise.result import Advice

FIRST_SHOWN = 1000
"""Requests after which progress is said; then after twice as many."""


@named_errors()
def advise(
    log: str = typer.Argument(..., metavar="LOG", help=f"{FORMATS} Traces with hash_ids, too."),
    model: Model = "smollm2",
    requests: int | None = typer.Option(None, min=1, help="Requests to read, at the most. Default: all."),
    block_size: BlockSize = 16,
    pool_tokens: int = typer.Option(1_000_000, min=1, help="Tokens that the KV pool holds; older ones are gone."),
    chat: bool = typer.Option(False, "--chat", help="Plain prompts are messages of a user to a chat model."),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="Leave out entries that cannot be used, and count them."),
    output: Path = typer.Option(Path("out/advise"), help="Folder for the picture and the page."),
    json: Json = None,
) -> None:
    """Say what breaks the prefixes of a log, and what could be reused.

    No engine is started. Prompt tokens are counted by what finds them: exact prefix caching, fusion and reuse at the
    same position, reuse of text that moved. What differs where a prefix ends is named, with the tokens that exact
    prefix caching would find if it stood elsewhere. Tokens are those of the model's tokenizer and chat template; no
    weights are loaded.
    """
    from jointkv.evaluate.advise.run import Settings, advise
    from jointkv.hf.models import load_tokenizer

    make_folder(output)
    locate(model)
    settings = Settings(block_size, pool_tokens, requests, skip_bad, chat)
    with stages(f"reading {log}") as show:
        found = advise(log, model, load_tokenizer(model), settings, _doubling(show))
    write_json(json, found.model_dump())
    if json != "-":
        _print(found)
    _draw(found, output)


def _doubling(show: Callable[[str], None]) -> Callable[[int], None]:
    """Says how many requests are done, in ever larger steps."""
    due = FIRST_SHOWN

    def progress(done: int) -> None:
        nonlocal due
        if done >= due:
            show(f"read {done:,} requests")
            due = 2 * done

    return progress


def _print(found: "Advice") -> None:
    console = stdout_console(100)
    share = found.share
    console.print(
        f"{found.requests:,} requests, {found.tokens:,} prompt tokens: exact prefix caching finds "
        f"{share(found.exact_tokens):.1%}; fusion and reuse at the same position {share(found.same_tokens):.1%} more; "
        f"{share(found.moved_tokens):.1%} more are resident at other positions.",
        highlight=False,
        markup=False,
    )
    for caution in found.cautions:
        console.print(f"caution: {caution}", highlight=False, markup=False)
    for row in found.breaks:
        console.print(
            f"\n{row.says} at token {row.token:,} breaks the prefix of {_requests(row.requests)} "
            f"({row.place}: {row.ours!r}, before {row.theirs!r}).\n  {row.advice}: +{row.gain:,} exact tokens, "
            f"{row.gain_share:.1%} of all.",
            highlight=False,
            markup=False,
        )
    if not found.breaks:
        console.print("No difference breaks prefixes that would be worth having.", highlight=False)


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number:,} requests"


def _draw(found: "Advice", output: Path) -> None:
    require("matplotlib")
    from jointkv.report.advice.page import write_page
    from jointkv.report.figure import png, style
    from jointkv.report.pictures.advice import AdvicePicture

    write_page(found, output / "advice.html")
    wrote(output / "advice.html")
    with style(), replacing(output / "advice.png") as file:
        file.write_bytes(png(AdvicePicture().draw([found])))
    wrote(output / "advice.png")
