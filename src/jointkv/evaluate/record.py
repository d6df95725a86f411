"""What every record is that this package writes as JSON, and what every result says of its origin."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from jointkv.system.machine import machine, versions

# A ratio of blocks or pages before to those after: drawn on logarithmic axes.
Positive = Annotated[float, Field(gt=0)]


class Record(BaseModel):
    """A part of a result. Fields that a reader does not know are left out: they may come without a new format."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Origin(Record):
    """Where the numbers of a result come from: by default this machine, and the versions installed on it."""

    versions: dict[str, str] = Field(default_factory=versions)
    machine: dict[str, str | int] = Field(default_factory=machine)
