"""What `jointkv evaluate frontier` writes, and which of its rows nothing beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from jointkv.evaluate.compare.result import PolicyRow
from jointkv.evaluate.record import Origin

FORMAT: Literal["jointkv.frontier/1"] = "jointkv.frontier/1"

KL_LIMITS = (1e-4, 1e-3, 1e-2)
"""Mean KL, in nats, for which the best ratio is stated."""


class FrontierRow(PolicyRow):
    """One policy on one traffic.

    Attributes:
        candidates, serves, decides, layer_groups: see `Series`.
        level: the bound on the error of a block, or the cosine of keys.
    """

    block_size: int
    candidates: str
    serves: str
    decides: str
    layer_groups: int
    level: float


class FrontierResult(Origin):
    """Ratio against KL of every policy that was tried."""

    format: Literal["jointkv.frontier/1"] = FORMAT
    model: str
    dtype: str
    settings: dict[str, Any] = Field(default_factory=dict)
    rows: list[FrontierRow]


def frontier(rows: Sequence[FrontierRow]) -> list[FrontierRow]:
    """The rows for which no other has at least the ratio at a smaller KL, in the order of their KL."""
    best: list[FrontierRow] = []
    for row in sorted(rows, key=lambda row: (row.kl, -row.ratio)):
        if not best or row.ratio > best[-1].ratio:
            best.append(row)
    return best


def best_within(rows: Sequence[FrontierRow], limit: float) -> FrontierRow | None:
    """The row with the largest ratio among those with a KL of at most `limit`."""
    return max((row for row in rows if row.kl <= limit), key=lambda row: row.ratio, default=None)
