"""What `evaluate curves` refuses before anything is computed."""

from pathlib import Path

import pytest

from tests.cli.commands import refusal


@pytest.mark.parametrize(
    ("output", "said"), [(".", "is a folder; name a file"), ("file/curves.json", "there is a file where a folder")]
)
def test_a_result_that_could_not_be_written(tiny: str, tmp_path: Path, output: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    assert said in refusal("evaluate", "curves", "--model", tiny, "--output", tmp_path / output)


def test_an_unknown_traffic(tiny: str) -> None:
    assert "unknown traffic 'nope'" in refusal("evaluate", "curves", "--model", tiny, "--traffic", "nope")
