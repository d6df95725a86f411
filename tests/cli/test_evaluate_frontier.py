"""`jointkv evaluate frontier` writes every policy tried, and its picture can be made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jointkv.report.pictures import make_pictures
from tests.cli.commands import refusal, run, save_tiny

SMALL = ("--requests", "3", "--tokens", "2", "--block-size", "8", "--bound", "0.5", "--bound", "0.2", "--cosine", "0.9")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_table_json_and_picture(tiny: str, tmp_path: Path) -> None:
    target, output = tmp_path / "result.json", tmp_path / "out"
    arguments = ("--model", tiny, "--traffic", "names", *SMALL, "--output", output, "--json", target)
    code, out, err = run("evaluate", "frontier", *arguments)
    assert code == 0, err
    result = json.loads(target.read_text())
    assert result == json.loads((output / "frontier.json").read_text())
    assert result["format"] == "jointkv.frontier/1" and result["settings"]["bounds"] == [0.2, 0.5]
    assert {row["traffic"] for row in result["rows"]} == {"names"} and {
        row["block_size"] for row in result["rows"]
    } == {8}
    assert "KL at most 0.001" in out and "signature" in out and "names, blocks of 8: tokens" in err
    assert [path.name for path in make_pictures([target], tmp_path)] == ["frontier.png", "frontier.md"]
    assert "| names | tokens |" in (tmp_path / "frontier.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--traffic", "poems"), "unknown traffic 'poems'"),
        (("--bound", "-1"), "bounds: -1"),
        (("--layer-groups", "each"), "layer_groups: 'each'"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], words: str, tiny: str, tmp_path: Path) -> None:
    assert words in refusal("evaluate", "frontier", "--model", tiny, *arguments, "--output", tmp_path / "out")
