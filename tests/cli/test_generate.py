"""`jointkv generate` answers as the plain model does, shows no padding, counts what the allocator counts."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from jointkv.cli import generate
from jointkv.hf.models import load_model
from tests.cli.commands import run, run_json, save_tiny

PROMPTS = ("How many apples are left in the basket?", "Tom buys 12 pens.")


def plain_tokens(folder: str, prompts: Sequence[str], new_tokens: int, attention: str = "sdpa") -> list[list[int]]:
    """New tokens of the stock model, all prompts in one left-padded batch."""
    model, tokenizer = load_model(folder, attn_implementation=attention)
    batch = tokenizer(list(prompts), padding=True, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    return output[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("attention", ["jointkv", "eager"])
def test_unfused_answers_are_those_of_the_plain_model(tiny: str, attention: str) -> None:
    result = run_json(
        "generate",
        *PROMPTS,
        *("--model", tiny, "--policy", "off", "--raw", "--max-new-tokens", "20", "--attention", attention),
    )
    stock = plain_tokens(tiny, PROMPTS, 20, "sdpa" if attention == "jointkv" else attention)
    _, tokenizer = load_model(tiny)
    assert result["answers"] == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in stock]
    assert result["policy"]["enabled"] is False and result["attention"] == attention
    stats = result["stats"]
    assert stats["references"] == stats["pages_used"] and stats["ratio"] == 1 and stats["fusion"] == "off"


def test_equal_prompts_share_pages(tiny: str) -> None:
    options = ("--model", tiny, "--block-size", "4", "--max-new-tokens", "16")
    result = run_json("generate", *(PROMPTS[0],) * 3, *options, "--max-relative-error", "0.05")
    stats = result["stats"]
    assert result["policy"]["max_relative_error"] == 0.05
    assert len(set(result["answers"])) == 1
    assert stats["ratio"] > 2 and stats["ratio"] == stats["references"] / stats["pages_used"]
    assert stats["bytes_used"] == stats["pages_used"] * stats["page_bytes"]
    assert stats["generated_tokens"] == 48 and result["seconds"] > 0


def test_finished_rows_show_and_hold_no_padding(tmp_path: Path, tiny: str) -> None:
    first, second = plain_tokens(tiny, PROMPTS, 24)
    end = next(token for token in first if token not in second)
    folder = save_tiny(tmp_path, end_token=end)
    result = run_json(
        "generate",
        *PROMPTS,
        "--model",
        folder,
        "--raw",
        "--policy",
        "off",
        "--max-new-tokens",
        "24",
        "--block-size",
        "4",
    )
    _, tokenizer = load_model(tiny)
    kept = first[: first.index(end) + 1]
    # The end token is an ordinary one here, so it is part of the text.
    assert result["answers"] == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (kept, second)]
    held = [
        len(tokenizer(prompt)["input_ids"]) + len(tokens) - 1
        for prompt, tokens in zip(PROMPTS, (kept, second), strict=True)
    ]
    assert result["stats"]["references"] == sum(-(-tokens // 4) for tokens in held)
    assert result["stats"]["generated_tokens"] == len(kept) + 24


def test_answers_are_printed_with_a_summary(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "And [bold]\\nyou?"}]}\n{"prompt": "Third"}\n')
    target = tmp_path / "result.json"
    arguments = ("--model", tiny, "--file", str(file), "--max-new-tokens", "5", "--json", str(target))
    code, out, err = run("generate", PROMPTS[0], *arguments)
    assert code == 0, err
    for title in (f"[1: {PROMPTS[0]}]", "[2: And [bold] you?]", "[3: Third]", "measured at the allocator"):
        assert out.count(title) == 1
    result = json.loads(target.read_text())
    assert result["prompts"] == [PROMPTS[0], [{"role": "user", "content": "And [bold]\nyou?"}], "Third"]
    assert f"{result['stats']['pages_used']} held, {result['stats']['references']} without fusion" in out


def test_chat_is_the_default_where_there_is_a_template(tiny: str, tmp_path: Path) -> None:
    def prompt_tokens(folder: str, *options: str) -> int:
        return run_json("generate", PROMPTS[0], "--model", folder, "--max-new-tokens", "1", *options)["stats"][
            "prompt_tokens"
        ]

    assert prompt_tokens(tiny) > prompt_tokens(tiny, "--raw")
    folder = save_tiny(tmp_path, template=None)
    assert prompt_tokens(folder) == prompt_tokens(tiny, "--raw")


def test_reuse_says_what_was_computed(tiny: str, tmp_path: Path) -> None:
    text = "Tom buys 12 pens and gives three of them to his sister, who has none. How many are left?"
    prompts = [f"{name}: {text}" for name in ("Ada", "Bob", "Eva")]
    options = ("--model", tiny, "--raw", "--block-size", "4", "--max-relative-error", "1e6", "--max-new-tokens", "4")
    stats = run_json("generate", *prompts, *options, "--reuse", "probed")["stats"]
    assert stats["reuse"] == "probed" and stats["prompt_tokens_exact"] == 0
    assert stats["prompt_tokens_computed"] == stats["prompt_tokens"] - stats["prompt_tokens_skipped"]
    code, out, err = run("generate", *prompts, *options, "--reuse", "licensed")
    assert code == 0, err
    assert f"{stats['prompt_tokens']} of {stats['prompt_tokens']} prompt tokens computed" in out, "no licence yet"
    stats = run_json("generate", *prompts, *options)["stats"]
    assert stats["reuse"] == "off" and stats["prompt_tokens_computed"] == stats["prompt_tokens"]


def test_sampling_follows_the_seed(tiny: str) -> None:
    options = (PROMPTS[0], "--model", tiny, "--max-new-tokens", "12", "--temperature", "2.5")
    answers = [run_json("generate", *options, "--seed", seed)["answers"] for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no prompt"),
        (("a", " "), "prompt 2 is empty"),
        (("a", "--policy", "bold"), "'bold' is none of safe, paper, off"),
        (("a", "--key-threshold", "3"), "key_threshold: 3.0 is not a number from -1 to 1"),
        (("a", "--max-relative-error", "nan"), "max_relative_error: nan"),
        (("a", "--policy", "off", "--key-threshold", "0.9"), "key_threshold: has no effect"),
        (("a", "--temperature", "inf"), "temperature: inf"),
        (("a", "--temperature", "1e-300"), "temperature: 1e-300 is neither 0 nor"),
        (("a", "\ud800"), "prompt 2 is not UTF-8"),
        (("--file", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
        (("a", "--model", "./nowhere"), "no model './nowhere'"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run("generate", *arguments)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if not line.startswith("loading")]
    assert len(lines) == 1 and message in lines[0]


def test_limits_of_pool_and_model_are_one_line(tiny: str, tmp_path: Path) -> None:
    code, _, err = run("generate", PROMPTS[0], "--model", tiny, "--max-pages", "1")
    assert code == 2 and "the KV pool is full" in err.splitlines()[-1]
    folder = save_tiny(tmp_path, tokens=32)
    code, _, err = run("generate", PROMPTS[1], "--model", folder, "--max-new-tokens", "30")
    assert code == 2 and "more than the 32" in err.splitlines()[-1]
    code, _, err = run("generate", PROMPTS[1], "--model", tiny, "--policy", "paper", "--block-size", "0")
    assert code == 2


def test_messages_that_the_template_cannot_take_are_refused(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n{"messages": [{"role": "tool", "content": "x"}]}\n')
    code, _, err = run("generate", "--model", tiny, "--file", str(file))
    assert code == 2 and "requests.jsonl:2: the chat template refuses the messages: no tools" in err.splitlines()[-1]
    folder = save_tiny(tmp_path / "bare", template=None)
    code, _, err = run("generate", "--model", folder, "--file", str(file))
    assert code == 2 and "requests.jsonl:2: messages, but" in err.splitlines()[-1]


class Bytes:
    """Decodes byte values, as a byte-level tokenizer does with parts of a character."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(token for token in tokens if token > 2).decode("utf-8", errors="replace")


def test_streamer_stops_rows_at_their_end_token() -> None:
    shown: list[list[str]] = []
    streamer = generate.BatchStreamer(
        Bytes(), 2, frozenset({1, 2}), lambda streamer: shown.append([streamer.text(0), streamer.text(1)])
    )
    streamer.put(torch.tensor([[0, 65], [65, 65]]))
    for step in ([72, 0xC3], [1, 0xA9], [0, 66], [88, 2]):
        streamer.put(torch.tensor(step))
    streamer.end()
    # No half character, nothing of the prompts, nothing after the end tokens.
    assert shown == [["H", ""], ["H", "é"], ["H", "éB"], ["H", "éB"], ["H", "éB"]]
    assert streamer.tokens == [[72, 1], [0xC3, 0xA9, 66, 2]] and streamer.finished == [True, True]


def test_display_draws_panels_on_a_terminal() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80, height=20)
    with generate._display(console, ["first [x]", "second " * 30]) as show:
        streamer = generate.BatchStreamer(Bytes(), 2, frozenset({1}), show)
        for step in ([[0], [0]], [72, 73], [1, 74]):
            streamer.put(torch.tensor(step))
        streamer.end()
    last = written.getvalue().split("1: first [x]")[-1]
    assert "│ H " in last and "│ IJ " in last and "2: second second" in last and "…" in last


CAPITALS = ("What is the capital of Japan?", "What is the capital of Russia?", "--max-new-tokens", "12")
"""The model holds no other token nearly as likely, whatever processor rounds: of Italy it does not."""


@pytest.mark.real_model
def test_real_model_answers_two_prompts() -> None:
    result = run_json("generate", *CAPITALS, "--max-relative-error", "0.05")
    assert "Tokyo" in result["answers"][0] and "Moscow" in result["answers"][1]
    # The two share the block of the system prompt and nothing else.
    assert result["stats"]["references"] - result["stats"]["pages_used"] == 1


@pytest.mark.real_model
def test_safe_policy_keeps_questions_apart_that_differ_in_one_word() -> None:
    answers = run_json("generate", *CAPITALS)["answers"]
    assert "Tokyo" in answers[0] and "Moscow" in answers[1]
