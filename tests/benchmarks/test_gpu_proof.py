"""The script that is to prove jointkv on a GPU runs without one, so that on that day it is not what fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

import gpu_proof

SCRIPT = Path(gpu_proof.__file__)


def prove(output: Path, *stages: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, SCRIPT, "--interpret", "--output", output]
    command += [word for stage in stages for word in ("--stage", stage)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    return done.returncode, json.loads((output / "gpu_proof.json").read_text()), done.stderr


def test_versions_and_a_small_pool(tmp_path: Path) -> None:
    code, result, err = prove(tmp_path, "imports", "page layouts", "a pool")
    assert code == 0 and result["complete"] and result["interpreted"], err
    first, layouts, contended = result["stages"]
    assert first["found"]["tested"] and layouts["outcome"] == "needs a GPU"
    assert contended["found"]["reuse"]["ttft_p50"] > 0


def test_the_first_stage_that_fails_is_the_last(tmp_path: Path) -> None:
    code, result, err = prove(tmp_path, "imports", "a pool", JOINTKV_TEST_DEVICE="", PYTHONPATH=str(broken(tmp_path)))
    assert code == 1 and not result["complete"] and "broken on purpose" in err
    assert [stage["outcome"] for stage in result["stages"]] == ["failed"]


def broken(folder: Path) -> Path:
    """A Triton that cannot be imported."""
    (folder / "triton.py").write_text("raise ImportError('broken on purpose')")
    return folder


@pytest.mark.slow
def test_all_that_can_be_interpreted_holds(tmp_path: Path) -> None:
    code, result, err = prove(tmp_path)
    assert code == 0, err
    assert {stage["outcome"] for stage in result["stages"]} == {"held", "needs a GPU"}
