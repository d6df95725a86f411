"""What `jointkv evaluate curves` writes."""

from __future__ import annotations

from typing import Literal

from jointkv.evaluate.record import Origin
from jointkv.theory.curve import RateDistortionCurve

FORMAT: Literal["jointkv.curves/1"] = "jointkv.curves/1"


class Curves(Origin):
    """Rate-distortion curves of one traffic, predicted from `requests` and measured on `held_out` others.

    `curves` has that of all layers together (group None), then that of each layer alone.
    """

    format: Literal["jointkv.curves/1"] = FORMAT
    model: str
    dtype: str
    traffic: str
    requests: int
    held_out: int
    block_size: int
    seed: int
    curves: list[RateDistortionCurve]
