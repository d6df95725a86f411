"""The programs in `examples/` run as they stand; on tiny models where that says as much."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.cli.commands import save_tiny

FOLDER = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.real_model
def test_an_agent_behind_a_nonce_skips_its_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jointkv.hf.reuse.Reuse.draws_audit", lambda self: False)
    (_, nothing), (tokens, skipped) = example("agent_behind_a_nonce").main(turns=2, tokens=2)
    assert nothing == 0 and skipped > 0.5 * tokens


def test_chats_share_their_system_prompt(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    stats = example("chat_loop").main(tiny)
    assert stats["pages_used"] < stats["references"] and "chat 2: What does it cost?" in capsys.readouterr().out


def test_calibrating_on_a_log(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    profile = example("calibrate_own_log").main(None, tiny, "kl=5")
    said = capsys.readouterr().out
    assert profile is not None and "number" in said and "predicted ratio" in said


def test_every_example_is_tried_here() -> None:
    tried = Path(__file__).read_text() + (Path(__file__).parents[1] / "vllm_plugin" / "test_examples.py").read_text()
    assert all(f'"{program.stem}"' in tried for program in FOLDER.glob("*.py"))
