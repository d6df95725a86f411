"""What `jointkv evaluate reuse` writes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from jointkv.evaluate.record import Origin, Record

FORMAT: Literal["jointkv.reuse/1"] = "jointkv.reuse/1"

ALL = "all"
"""In place of a kind: all kinds together, each with equally many requests."""


class Share(Record):
    """What becomes of blocks.

    Attributes:
        skipped: share of all prompt tokens that are not computed, headers included.
        missed: share of the reused blocks that are beyond the bounds; None where none is reused.
        reused: number of reused blocks.
    """

    skipped: float
    missed: float | None
    reused: int


class Evidenced(Record):
    """For how many sources and witnesses, and tokens per block, numbers were measured."""

    block_size: int
    sources: int
    witnesses: int


class HeldOutRow(Evidenced):
    """A predictor whose limit was chosen on other texts, as the largest that keeps the missed share within `rate`.

    Attributes:
        chosen: `all` where one limit serves all kinds, `kind` where each has its own.
        shares: by kind, and of all kinds where they have one limit.
    """

    predictor: str
    rate: float
    chosen: Literal["all", "kind"]
    shares: dict[str, Share]


class Curve(Evidenced):
    """A predictor at several limits, which are quantiles of its scores; see `Share`, a point each."""

    predictor: str
    kind: str
    limit: list[float]
    skipped: list[float]
    missed: list[float]


class RuleRow(Evidenced):
    """`ReuseRule` as it is by default, by kind."""

    shares: dict[str, Share]


class TextRow(Record):
    """All pairs of requests with one text.

    Attributes:
        beyond: share of blocks behind the entry block that are beyond the bounds.
        entry_within: share of pairs whose entry block is within.
        beyond_within: share of blocks beyond the bounds among these pairs; None without any.
        mean: mean ratio by block.
    """

    block_size: int
    kind: str
    text: str
    pairs: int
    beyond: float
    entry_within: float
    beyond_within: float | None
    mean: list[float]


class FeatureRow(Record):
    """Blocks that clean witnesses would let reuse, by a feature: how many, and which share is beyond the bounds."""

    block_size: int
    kind: str
    feature: str
    value: str
    blocks: int
    missed: float | None


class ReuseResult(Origin):
    """What predicts a skipped block, on one model."""

    format: Literal["jointkv.reuse/1"] = FORMAT
    model: str
    dtype: str
    settings: dict[str, Any] = Field(default_factory=dict)
    predictors: dict[str, str] = Field(default_factory=dict)
    texts: list[TextRow] = Field(default_factory=list)
    held_out: list[HeldOutRow] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    rule: list[RuleRow] = Field(default_factory=list)
    features: list[FeatureRow] = Field(default_factory=list)
