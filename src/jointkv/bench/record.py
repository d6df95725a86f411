"""What all parts of a benchmark's result have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Read-only, and no field that is not known here."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
