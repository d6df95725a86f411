"""`jointkv inspect` measures the K and V of real prefills and writes table, JSON and picture."""

import json
import sys
from pathlib import Path

import pytest
import torch

from jointkv.evaluate.holding.prefilled import from_dense
from jointkv.evaluate.predict.similarity import prefill_rows, similarities
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.models import load_model
from tests.cli.commands import run, run_json

PNG = b"\x89PNG\r\n"
TEXTS = (
    "Tom buys 12 pens and Ann has 7.",
    "Tom buys 15 pens and Ann has 9.",
    "Nobody knows how many there are.",
)


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return str(file)


def test_rows_of_a_file(tiny: str, data: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run_json("inspect", "--model", tiny, "--data", data, "--block-size", "4", "--output", str(output))
    rows = result.pop("rows")
    assert [(row["layer"], row["relation"], row["side"]) for row in rows] == [
        (layer, relation, side) for layer in range(4) for relation in ("across", "within") for side in ("key", "value")
    ]
    for row in rows:
        assert row["pairs"] > 0 and -1 <= row["p50"] <= row["p90"] <= row["p99"] <= row["max"] <= 1
        assert 0 <= row["share_within_0.1"] <= row["share_within_0.2"] <= 1
    assert result["requests"] == 3 and result["block_size"] == 4 and result["source"] == data
    reuse = result["reuse"]
    assert reuse["tokens"]["tokens"] == result["tokens"] and reuse["tokens"]["missed_blocks"] is None
    assert reuse["audits"]["skipped_tokens"] <= reuse["tokens"]["skipped_tokens"]
    assert (output / "similarity.png").read_bytes().startswith(PNG)


def test_built_in_traffic_needs_no_data(tiny: str, tmp_path: Path) -> None:
    arguments = ("--model", tiny, "--requests", "3", "--tokens", "96", "--output", str(tmp_path))
    code, out, err = run("inspect", *arguments, "--chunk-tokens", "32", "--json", str(tmp_path / "a.json"))
    assert code == 0, err
    assert "Across requests" in out and "equal places of chunks of 32 tokens" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "prefilled request 3 of 3" in err and f"wrote {tmp_path / 'similarity.png'}" in err
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    # 6 blocks at equal positions of 3 requests; per request 2 places in 3 chunks.
    assert {(row["relation"], row["pairs"]) for row in rows} == {("across", 18), ("within", 18)}


def test_text_alone_needs_no_weights(tiny: str, tmp_path: Path) -> None:
    text = "Tom buys 12 pens and gives three of them to his sister, who has none. How many are left?"
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{name}: {text}"}) + "\n" for name in ("Ada", "Bob", "Eva")))
    arguments = ("inspect", "--model", tiny, "--data", file, "--block-size", "4", "--text-only")
    result = run_json(*arguments)
    assert "rows" not in result and result["reuse"]["tokens"]["requests"] == 3
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "from tokens alone" in out and "With this model" not in out and "loading" not in err
    code, out, _ = run(*arguments[:-1], "--output", tmp_path)
    assert code == 0 and "With this model" in out


@pytest.mark.parametrize(("scope", "relation"), [("batch", "across"), ("chunk", "within")])
def test_scope(tiny: str, data: str, tmp_path: Path, scope: str, relation: str) -> None:
    arguments = ("--model", tiny, "--data", data, "--block-size", "4", "--output", str(tmp_path))
    rows = run_json("inspect", *arguments, "--scope", scope)["rows"]
    assert {row["relation"] for row in rows} == {relation} and len(rows) == 8


def test_prefill_holds_what_the_stock_cache_holds(tiny: str) -> None:
    model, _ = load_model(tiny)
    ids = torch.randint(3, 400, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = [model(input_ids=row[None], use_cache=True).past_key_values for row in ids]
    dense = from_dense(model, [Request((*row, 0), (), "") for row in ids.tolist()], stock, 4)
    done: list[int] = []
    batch = prefill_rows(model, ids.tolist(), 4, done.append)
    assert done == [1, 2] and batch.layers == 4
    for found, expected in zip(similarities(batch, 32), similarities(dense, 32), strict=True):
        assert found.pairs == expected.pairs == (3 if found.relation == "across" else 6)
        assert found.mean == pytest.approx(expected.mean, abs=1e-2)


def test_messages_need_a_chat_template_and_a_single_request_has_nothing_across(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": TEXTS[0] * 3}]}))
    arguments = ("--model", tiny, "--data", str(file), "--block-size", "4", "--output", str(tmp_path))
    rows = run_json("inspect", *arguments)["rows"]
    assert {row["mean"] for row in rows if row["relation"] == "across"} == {None}
    code, out, _ = run("inspect", *arguments)
    assert code == 0 and "(0 pairs per layer)" in out and " - " in out
    code, _, err = run("inspect", *arguments, "--scope", "batch")
    assert code == 2 and "no two blocks to compare" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chunk-tokens", "100"), "chunk_tokens: 100 is no multiple of the block size 16"),
        (("--traffic", "heavy"), "unknown traffic 'heavy'"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
        (("--model", "./nowhere"), "no model './nowhere'"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run("inspect", *arguments)
    assert code == 2 and out == "" and message in err.splitlines()[-1]


def test_short_requests_and_unwritable_pictures_are_refused(tiny: str, data: str, tmp_path: Path) -> None:
    code, _, err = run("inspect", "--model", tiny, "--data", data, "--tokens", "15")
    assert code == 2 and "no request fills a block of 16 tokens" in err.splitlines()[-1]
    code, out, err = run("inspect", "--model", tiny, "--data", data, "--block-size", "4", "--output", data)
    assert (code, out) == (2, "") and "a file where a folder is needed" in err.splitlines()[-1]


def test_without_matplotlib_the_tables_still_come(
    tiny: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ("--model", tiny, "--data", data, "--block-size", "4", "--output", str(tmp_path))
    code, out, err = run("inspect", *arguments)
    assert code == 2 and "Across requests" in out and "pip install 'jointkv[plot]'" in err.splitlines()[-1]
