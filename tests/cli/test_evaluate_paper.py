"""`jointkv evaluate paper` writes all three experiments with the source of every row."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jointkv.evaluate.samples import packaged
from tests.cli.commands import refusal, run, run_json, save_tiny

SIZES = ("--largest", "8", "--prompt-tokens", "16", "--answer-tokens", "3", "--block-size", "4", "--documents", "1")
SIZES += ("--chunks", "3", "--chunk-tokens", "16", "--document-answer-tokens", "4", "--layers-requests", "8")
DATA = ("--dataset", "GSM8K", "--dataset", "OpenMathInstruct-2", "--document", "hotpotqa")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of six layers: the paper's preset fuses the two in the middle."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers = 6
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("JOINTKV_DATA_DIR", str(tmp_path))
    prompt = packaged("novel_sample.txt").read_text(encoding="utf-8")[:2000]
    file = tmp_path / "longbench/hotpotqa.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps({"prompt": prompt, "answers": ["a girl of great taste"]}) + "\n", encoding="utf-8")
    return tmp_path


def test_all_experiments(tiny: str, tmp_path: Path) -> None:
    target, output = tmp_path / "result.json", tmp_path / "out"
    arguments = ("--model", tiny, *SIZES, *DATA, "--output", output, "--json", target)
    code, out, err = run("evaluate", "paper", *arguments)
    assert code == 0, err
    result = json.loads(target.read_text())
    assert result == json.loads((output / "paper.json").read_text())
    assert result["format"] == "jointkv.paper/1" and result["settings"]["parts"] == ["batch", "chunk", "layers"]
    assert result["settings"]["thresholds"] == [0.75, 0.9] and result["machine"]["cores"] > 0
    assert {(row["dataset"], row["stand_in"]) for row in result["batch"]} == {
        ("GSM8K", False),
        ("OpenMathInstruct-2", True),
    }
    assert [row["batch"] for row in result["batch"]] == 2 * [2, 2, 2, 4, 4, 4, 8, 8, 8]
    assert len(result["growth"]) == 12 and len(result["chunk"]) == 4 and len(result["layers"]) == 4
    assert all(row["source"] for row in result["batch"] + result["chunk"])
    assert "OpenMathInstruct-2*" in out and "paper 0.62" in out and "rarefaction" in out


def test_one_part_and_json_on_stdout(tiny: str, tmp_path: Path) -> None:
    arguments = ("--model", tiny, *SIZES, "--part", "layers", "--threshold", "0.5", "--output", tmp_path / "out")
    result = run_json("evaluate", "paper", *arguments)
    assert [(row["layer"], row["threshold"]) for row in result["layers"]] == [(2, 0.5), (3, 0.5)]
    assert result["batch"] == result["growth"] == result["chunk"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "HelpSteer", "--part", "batch"), "HelpSteer"),
        (("--document", "lcc", "--part", "chunk"), "lcc"),
        (("--part", "table"), "table"),
        (("--threshold", "3"), "key_threshold"),
        (("--chunk-tokens", "10", "--part", "chunk"), "chunk_tokens"),
        (("--largest", "1"), "largest"),
    ],
)
def test_bad_input_is_one_line(tiny: str, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    given = (*SIZES, "--document", "hotpotqa", *arguments) if "--document" not in arguments else (*SIZES, *arguments)
    assert message in refusal("evaluate", "paper", "--model", tiny, *given, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
