"""Committed results are read by the models of their producers, and come back as they were."""

import json
from pathlib import Path

import pytest

from jointkv.evaluate.calibrate.result import Calibrations
from jointkv.evaluate.compare.result import Evaluation
from jointkv.evaluate.paper.result import PaperResult
from jointkv.evaluate.predict.result import Curves

KINDS = {kind.model_fields["format"].default: kind for kind in (Evaluation, PaperResult, Curves, Calibrations)}
FOLDER = Path(__file__).parents[2] / "docs" / "results"
FILES = [path for path in FOLDER.rglob("*.json") if path.parent.name in ("evaluate", "paper", "calibration")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_come_back_unchanged(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    kind = KINDS.get(json.loads(text)["format"])
    if kind is not None:
        again = kind.model_validate_json(text).model_dump(mode="json", exclude_none=kind is Calibrations)
        assert again == json.loads(text)
