"""`jointkv evaluate reuse` writes what every predictor lets skip, and refuses settings that make no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jointkv.cli import evaluate_reuse
from tests.cli.commands import refusal, run, run_json, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers take more tokens with the tiny model's tokenizer."""
    monkeypatch.setattr(evaluate_reuse, "QUICK", {**evaluate_reuse.QUICK, "text_tokens": 128, "header_tokens": 96})


def test_tables_and_json(tiny: str, tmp_path: Path) -> None:
    target, output = tmp_path / "result.json", tmp_path / "out"
    code, out, err = run("evaluate", "reuse", "--model", tiny, "--quick", "--output", output, "--json", target)
    assert code == 0, err
    result = json.loads(target.read_text())
    assert result == json.loads((output / "reuse.json").read_text())
    assert result["format"] == "jointkv.reuse/1" and result["settings"]["headers"] == 8
    assert {row["kind"] for row in result["texts"]} == {"ids", "names", "instructions", "museum"}
    assert {row["predictor"] for row in result["held_out"]} == set(result["predictors"])
    assert "3 sources, 4 witnesses" in out and "echoes explain" in out and "The rule of the engine" in out
    assert "museum before flights (8 of 8)" in err


def test_one_kind_on_stdout(tiny: str, tmp_path: Path) -> None:
    arguments = ("--quick", "--kind", "ids", "--witnesses", "2", "--output", tmp_path / "out")
    result = run_json("evaluate", "reuse", "--model", tiny, *arguments)
    assert {row["kind"] for row in result["texts"]} == {"ids"} and {row["witnesses"] for row in result["rule"]} == {2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kind", "poems"), "unknown kind of headers 'poems'"),
        (("--headers", "3"), "headers: 3 is less than 8"),
        (("--text-tokens", "100"), "block size 16"),
        (("--text-tokens", "0"), "text_tokens: 0 is less than 16"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], words: str, tiny: str, tmp_path: Path) -> None:
    assert words in refusal("evaluate", "reuse", "--model", tiny, *arguments, "--output", tmp_path / "out")
