"""What every record of a JSON result is, and every result."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A part of a result. Fields that no picture reads are left out: they may change without a new format."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Result(Record):
    """One result file; a subclass per format, which is named in the field "format" of the file."""

    FORMAT: ClassVar[str]

    def conflict(self, other: Result) -> str | None:
        """Why this result and `other`, of the same format, must not be put into one picture; None if they may."""
        return None
