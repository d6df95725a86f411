"""Options that several verbs share mean the same in each."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer.main

from jointkv.cli.main import app
from tests.cli.commands import run, run_json

CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
LOG = (
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "How many pens has Tom?"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "user", "content": "Well?"},
        ],
        "tools": [{"type": "function", "function": {"name": "look_up"}}],
    },
    {"conversations": [{"from": "human", "value": "How many pens has Ann?"}, {"from": "gpt", "value": "None."}]},
)


SEEDED = [
    *(("calibrate",), ("demo",), ("generate",), ("inspect",), ("traffic",), ("bench", "serve"), ("evaluate",)),
    *(("evaluate", name) for name in ("curves", "frontier", "paper", "reuse")),
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, LOG)))
    return path


@pytest.mark.parametrize("verb", [("advise",), ("inspect",), ("calibrate",), ("generate",), ("bench", "serve")])
def test_help_names_what_can_be_read(verb: tuple[str, ...]) -> None:
    code, out, _ = run(*verb, "--help")
    assert code == 0
    assert all(word in out for word in ("messages", "conversations", ".parquet", ".txt", "hub:"))


@pytest.mark.parametrize("seed", ["-1", "4294967296", "1.5"])
@pytest.mark.parametrize("verb", SEEDED, ids=" ".join)
def test_a_seed_is_one_that_every_generator_takes(verb: tuple[str, ...], seed: str) -> None:
    """Some of them refused others only where they were used, which was minutes later."""
    code, out, err = run(*verb, "--seed", seed)
    assert code == 2 and out == "" and "--seed" in err


def test_these_are_all_that_have_a_seed() -> None:
    found: list[tuple[str, ...]] = []

    def walk(command: Any, path: tuple[str, ...]) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, (*path, name))
        if any("--seed" in option.opts for option in command.params):
            found.append(path)

    walk(typer.main.get_command(app), ())
    assert sorted(found) == sorted(SEEDED)


def test_one_log_for_every_verb(tiny: str, log: Path) -> None:
    found = run_json("inspect", "--model", tiny, "--data", log, "--block-size", "4", "--text-only")
    assert found["requests"] == 2
    answers = run_json("generate", "--model", tiny, "--file", log, "--max-new-tokens", "1")
    assert answers["prompts"][0][0]["content"] == "How many pens has Tom?"
    assert answers["prompts"][1] == "How many pens has Ann?"
    code, _, err = run("calibrate", "--model", tiny, "--data", log, "--target", "kl=0.1")
    assert code == 2 and "2 requests are too few" in err
