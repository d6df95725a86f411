"""`jointkv demo` writes rows, table and chart; numbers come from the pool."""

import json
from pathlib import Path

import pytest

from jointkv.cli.demo import FULL, QUICK
from tests.cli.commands import refusal, run

KEYS = {"traffic", "policy", "ratio", "pages_before", "pages_after", "bytes_before", "bytes_after", "kl", "top1"}
KEYS |= {"nll", "nll_unfused", "seconds_fuse", "seconds_prefill"}


def test_a_first_look_is_small(tiny_long: str, tmp_path: Path) -> None:
    code, _, err = run("demo", "--model", tiny_long, "--requests", 2, "--output", tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / "demo.json").read_text())
    assert {row["traffic"] for row in result["rows"]} == {"near_prefix", "unrelated"}
    assert result["settings"]["requests"] == 2 and result["settings"]["tokens"] == QUICK[1] < FULL[1]


def test_rows_table_and_chart(tiny_long: str, tmp_path: Path) -> None:
    output, target = tmp_path / "out", tmp_path / "result.json"
    options = ("--full", "--requests", 3, "--tokens", 4, "--output", output, "--json", target)
    code, out, err = run("demo", "--model", tiny_long, *options)
    assert code == 0, err
    rows = json.loads(target.read_text())["rows"]
    assert [(row["traffic"], row["policy"]) for row in rows] == [
        (traffic, policy)
        for traffic in ("near_prefix", "names", "unrelated")
        for policy in ("unfused", "safe", "paper", "safe, reuse")
    ]
    for row in rows:
        assert set(row) >= KEYS
        assert row["ratio"] == row["pages_before"] / row["pages_after"]
        if row["policy"] != "safe, reuse":  # which never held the pages before
            assert row["bytes_after"] * row["pages_before"] == row["bytes_before"] * row["pages_after"]
        assert 0 <= row["tokens_skipped"] < row["prompt_tokens"]
        assert not row["tokens_skipped"] or row["policy"] == "safe, reuse"
        if row["policy"] == "unfused":
            assert row["pages_before"] == row["pages_after"] and row["kl"] == 0 and row["top1"] == 1
    lines = [line.split() for line in out.splitlines()]
    assert sum(line[:2] == ["near-prefix", "safe"] for line in lines) == 1 and "unrelated" in out
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "demo.md").read_text().count("\n") == 2 + len(rows)
    assert json.loads((output / "demo.json").read_text())["rows"] == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "/nowhere"), "/nowhere"),
        (("--key-threshold", "2"), "key_threshold"),
        (("--max-relative-error", "-1"), "max_relative_error"),
        (("--requests", "5000"), "5000"),
        (("--dtype", "int3"), "int3"),
    ],
)
def test_bad_input_is_one_line(tiny_long: str, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    model = () if "--model" in arguments else ("--model", tiny_long)
    assert message in refusal("demo", "--output", tmp_path, *model, *arguments)
    assert not (tmp_path / "demo.json").exists()
