"""`jointkv demo` writes rows, table and chart; numbers come from the pool."""

import json
from pathlib import Path

import pytest

from tests.cli.test_generate import run, save_tiny

KEYS = {"traffic", "policy", "ratio", "pages_before", "pages_after", "bytes_before", "bytes_after", "kl", "top1"}
KEYS |= {"nll", "nll_unfused", "seconds_fuse", "seconds_prefill"}
TRAFFICS = ("near_prefix", "names", "unrelated")
POLICIES = ("unfused", "safe", "paper")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"), tokens=8192)


def test_rows_table_and_chart(tiny: str, tmp_path: Path) -> None:
    output, target = tmp_path / "out", tmp_path / "result.json"
    arguments = ("--model", tiny, "--requests", "3", "--tokens", "4", "--output", str(output), "--json", str(target))
    code, out, err = run("demo", *arguments)
    assert code == 0, err
    rows = json.loads(target.read_text())["rows"]
    assert [(row["traffic"], row["policy"]) for row in rows] == [
        (traffic, policy)
        for traffic in ("near_prefix", "names", "unrelated")
        for policy in ("unfused", "safe", "paper")
    ]
    for row in rows:
        assert set(row) >= KEYS
        assert row["ratio"] == row["pages_before"] / row["pages_after"]
        assert row["bytes_after"] * row["pages_before"] == row["bytes_before"] * row["pages_after"]
        if row["policy"] == "unfused":
            assert row["pages_before"] == row["pages_after"] and row["kl"] == 0 and row["top1"] == 1
    assert "near_prefix" in out and "unrelated" in out
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
def test_bad_input_is_one_line(tiny: str, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run(
        "demo", "--output", str(tmp_path), *(() if "--model" in arguments else ("--model", tiny)), *arguments
    )
    assert code == 2 and err.strip().splitlines()[-1].startswith("error:") and message in err
    assert "Traceback" not in err and not (tmp_path / "demo.json").exists()
