"""`jointkv generate`: answer several prompts at once on shared KV pages, and say what the pages cost."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from jointkv.cli.console import named_errors, stderr_console, write_json
from jointkv.cli.loading import load
from jointkv.cli.options import FORMATS, SEEDS, Json, Model, Reuse, ReuseOption
from jointkv.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jointkv.evaluate.request_files import UserRequest
    from jointkv.hf.pool import JointPool
    from jointkv.policy import FusionPolicy
    from jointkv.policy.profile import Profile

REFRESH_S = 0.1
BLOCK_SIZE = 16
TITLE_CHARACTERS = 60
LEAST_TEMPERATURE = 1e-4
"""Logits divided by less would not be finite numbers of float32."""


class Attention(StrEnum):
    """How the model reads K and V: from the pages, or from a dense copy per layer."""

    JOINTKV = "jointkv"
    EAGER = "eager"


class BatchStreamer:
    """A streamer for `generate` that collects the new tokens of each of `rows` sequences, up to one of `end_tokens`.

    transformers' own `TextStreamer` takes one sequence only. `show` is called after every step with this object.

    Attributes:
        tokens: new token ids per row, end token included; what follows it is padding.
        finished: one flag per row.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        rows: int,
        end_tokens: frozenset[int],
        show: Callable[["BatchStreamer"], None],
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.finished = [False] * rows
        self._tokenizer, self._end_tokens, self._show = tokenizer, end_tokens, show
        self._prompts_seen = False

    def put(self, value: "Tensor") -> None:
        """Take the prompts at the first call, then one token per row."""
        if not self._prompts_seen:
            self._prompts_seen = True
            return
        for row, token in enumerate(value.flatten().tolist()):
            if not self.finished[row]:
                self.tokens[row].append(token)
                self.finished[row] = token in self._end_tokens
        self._show(self)

    def end(self) -> None:
        """No token will follow."""
        self.finished = [True] * len(self.finished)
        self._show(self)

    def text(self, row: int) -> str:
        """The answer of `row` so far, without special tokens and without half a character at its end."""
        text = str(self._tokenizer.decode(self.tokens[row], skip_special_tokens=True))
        return text if self.finished[row] else text.rstrip("\ufffd")


@named_errors()
def generate(
    prompts: list[str] | None = typer.Argument(None, help="One or more prompts.", show_default=False),
    model: Model = "smollm2",
    policy: str = typer.Option("safe", help="What may be fused: safe, paper or off."),
    profile: Path | None = typer.Option(None, help="What `jointkv calibrate` wrote, instead of a policy."),
    max_relative_error: float | None = typer.Option(None, help="Error bound instead of the policy's."),
    key_threshold: float | None = typer.Option(None, help="Least cosine of K instead of the policy's."),
    reuse: Reuse = ReuseOption.OFF,
    max_new_tokens: int = typer.Option(64, min=1, help="Longest answer, in tokens."),
    block_size: int | None = typer.Option(None, min=1, help="Tokens per KV block. Default 16, or the profile's."),
    max_pages: int | None = typer.Option(None, min=1, help="Pages in the pool; without it the pool grows."),
    chat: bool = typer.Option(True, "--chat/--raw", help="Use the model's chat template, if it has one."),
    file: Path | None = typer.Option(None, help=f"More prompts. {FORMATS}"),
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the most likely token, else samples."),
    seed: int = typer.Option(0, help="Seed of the sampling.", **SEEDS),
    attention: Attention = typer.Option(Attention.JOINTKV, help="Attention on pages, or on a dense copy."),
    json: Json = None,
) -> None:
    """Answer all prompts in one batch, and print the memory held."""
    from jointkv.evaluate.request_files import prompts_of
    from jointkv.hf.pool import JointPool
    from jointkv.hf.reuse import ReuseOptions

    fusion = _fusion(policy, profile, max_relative_error, key_threshold)
    requests = _gathered(prompts or [], file)
    if temperature and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise BadInput(f"temperature: {temperature} is neither 0 nor a finite number of at least {LEAST_TEMPERATURE}")
    loaded, tokenizer = load(model, attn_implementation=None if attention is Attention.JOINTKV else "eager")
    rows = prompts_of(tokenizer, requests, chat=chat)
    _check_lengths(rows, loaded, max_new_tokens)
    size = block_size or int(getattr(fusion, "block_size", BLOCK_SIZE))
    bound = max_relative_error if profile is not None else None
    chosen = ReuseOptions(reuse.value, seed=seed)
    pool = JointPool(loaded, fusion, block_size=size, max_pages=max_pages, max_relative_error=bound, reuse=chosen)
    options = {"max_new_tokens": max_new_tokens, **_sampling(temperature, seed)}
    asked = [request.prompt or list(request.messages) for request in requests]
    names = [request.prompt or str(request.messages[-1]["content"]) for request in requests]
    console = stderr_console() if json == "-" else Console()
    with _display(console, names) as show:
        result = answer(pool, loaded, tokenizer, rows, options, show)
    console.print(_summary(result["stats"], result["seconds"]), soft_wrap=True, highlight=False)
    write_json(json, {"model": model, "policy": pool.policy, "attention": attention, "prompts": asked, **result})


def answer(
    pool: "JointPool",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
    options: dict[str, Any],
    show: Callable[[BatchStreamer], None],
) -> dict[str, Any]:
    """Generate for `rows` (token ids) as one left-padded batch in a `JointCache` of `pool`.

    `options` goes to transformers' `generate`. Returns `answers`, `stats` (pages and bytes at the allocator) and
    `seconds`, prefill included. Raises `PoolFull`.
    """
    import torch

    from jointkv.hf.cache import JointCache

    batch = tokenizer.pad({"input_ids": [list(row) for row in rows]}, padding=True, return_tensors="pt")
    ends = model.generation_config.eos_token_id
    end_tokens = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    streamer = BatchStreamer(tokenizer, len(rows), end_tokens, show)
    cache = JointCache(pool)
    batch = batch.to(model.device)
    start = time.perf_counter()
    prefilled = cache.prefill(model, batch["input_ids"], batch["attention_mask"])
    model.generate(
        **batch,
        past_key_values=cache,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    seconds = time.perf_counter() - start
    # The last token of an answer is never fed back. But a finished row is fed padding until the last row
    # ends, in blocks that are alike in all rows and would make the ratio look better than it is.
    held = [len(row) + len(tokens) - 1 for row, tokens in zip(rows, streamer.tokens, strict=True)]
    for table in cache.tables:
        table.truncate(-(-torch.tensor(held) // pool.block_size))
    generated = sum(len(tokens) for tokens in streamer.tokens)
    stats = {
        "prompt_tokens": prefilled.tokens,
        "prompt_tokens_computed": prefilled.computed,
        "prompt_tokens_exact": prefilled.exact,
        "generated_tokens": generated,
        "tokens_per_second": generated / seconds,
        "ratio": cache.stats()["ratio"],
        **pool.stats(),
    }
    return {"answers": [streamer.text(row) for row in range(len(rows))], "stats": stats, "seconds": seconds}


def _fusion(
    name: str, profile: Path | None, max_relative_error: float | None, key_threshold: float | None
) -> "FusionPolicy | Profile":
    from jointkv.policy import FusionPolicy
    from jointkv.policy.profile import Profile

    if profile is not None:
        if name != "safe" or key_threshold is not None:
            raise BadInput("--profile takes the place of --policy and --key-threshold; leave those out")
        return Profile.load(profile)
    given = {"max_relative_error": max_relative_error, "key_threshold": key_threshold}
    changes = {field: value for field, value in given.items() if value is not None}
    policy = FusionPolicy.preset(name, **changes)
    if changes and not policy.enabled:
        raise BadInput(f"{next(iter(changes))}: has no effect with the policy off")
    return policy


def _gathered(prompts: Sequence[str], file: Path | None) -> list["UserRequest"]:
    from jointkv.evaluate.request_files import UserRequest, read_requests
    from jointkv.evaluate.request_sources import Place

    if not prompts and file is None:
        raise BadInput('no prompt; give at least one, as in: jointkv generate "Why is the sky blue?"')
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise BadInput(f"prompt {number} is empty")
        if not prompt.isascii() and any("\ud800" <= sign <= "\udfff" for sign in prompt):
            raise BadInput(f"prompt {number} is not UTF-8; put it into a file in UTF-8 for --file")
    requests = [
        UserRequest(Place("the command line", "prompt", number), prompt)
        for number, prompt in enumerate(prompts, start=1)
    ]
    return requests + (read_requests(file) if file is not None else [])


def _check_lengths(rows: Sequence[Sequence[int]], model: "PreTrainedModel", new_tokens: int) -> None:
    from jointkv.evaluate.holding.batch import context_of

    longest = context_of(model)
    for number, row in enumerate(rows, start=1):
        if not row:
            raise BadInput(f"prompt {number} has no token")
        if longest is not None and len(row) + new_tokens > longest:
            raise BadInput(
                f"prompt {number}: {len(row)} tokens and {new_tokens} new ones are more than the {longest} "
                "that the model can attend to"
            )


def _sampling(temperature: float, seed: int) -> dict[str, Any]:
    import torch

    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


@contextmanager
def _display(console: Console, prompts: Sequence[str]) -> Iterator[Callable[[BatchStreamer], None]]:
    """Yields `show(streamer)`: on a terminal a growing panel per prompt, else each answer when complete."""
    lines = [" ".join(prompt.split()) for prompt in prompts]
    cut = [line if len(line) <= TITLE_CHARACTERS else f"{line[: TITLE_CHARACTERS - 1]}…" for line in lines]
    titles = [f"{number}: {line}" for number, line in enumerate(cut, start=1)]
    shown = 0.0
    printed: set[int] = set()

    def draw(streamer: BatchStreamer) -> None:
        nonlocal shown
        # Drawing at every token would cost more than a small model needs to make it.
        if time.monotonic() - shown > REFRESH_S or all(streamer.finished):
            panels = [
                Panel(Text(streamer.text(row)), title=Text(title), title_align="left")
                for row, title in enumerate(titles)
            ]
            live.update(Group(*panels), refresh=True)
            shown = time.monotonic()

    def print_complete(streamer: BatchStreamer) -> None:
        for row, finished in enumerate(streamer.finished):
            if finished and row not in printed:
                printed.add(row)
                console.print(Text(f"[{titles[row]}]\n{streamer.text(row).strip()}\n"), soft_wrap=True)

    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield draw
    else:
        yield print_complete


def _summary(stats: dict[str, Any], seconds: float) -> str:
    unfused = stats["references"] * stats["page_bytes"]
    lines = [
        f"KV pages   {stats['pages_used']} held, {stats['references']} without fusion: {stats['ratio']:.2f}x "
        "(measured at the allocator)",
        f"KV bytes   {stats['bytes_used'] / 1e6:.2f} MB held, {unfused / 1e6:.2f} MB without fusion",
        f"speed      {stats['generated_tokens']} tokens in {seconds:.1f} s: "
        f"{stats['tokens_per_second']:.1f} tokens/s, prefill included",
    ]
    if stats["reuse"] != "off":
        computed, asked = stats["prompt_tokens_computed"], stats["prompt_tokens"]
        lines.insert(2, f"prefill    {computed} of {asked} prompt tokens computed, the others read from resident pages")
    if stats["fusion"] == "faulted":
        lines.append("fusion     switched off after an internal fault; the answers are those of an unfused cache")
    return "\n".join(lines)
