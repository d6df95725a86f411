"""What calibrations on random splits write: whether the target was met, and whether the ratio was predicted."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from jointkv.evaluate.record import Origin, Record
from jointkv.policy.profile import Measurement, Prediction

FORMAT: Literal["jointkv.calibration/1"] = "jointkv.calibration/1"


class CalibrationRow(Record):
    """One calibration on one random split; `unmet` says why the target cannot be met, and then nothing was measured."""

    traffic: str
    target: str
    seed: int
    unmet: str | None = None
    max_relative_error: list[float] = Field(default_factory=list)
    predicted: Prediction | None = None
    predicted_equal_text: Prediction | None = None
    held_out: Measurement | None = None
    met: bool
    seconds: float | None = None


class Calibrations(Origin):
    """Calibrations on random splits of built-in traffic."""

    format: Literal["jointkv.calibration/1"] = FORMAT
    model: str
    settings: dict[str, Any]
    rows: list[CalibrationRow]
