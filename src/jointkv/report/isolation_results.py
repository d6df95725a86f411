"""Results about tenants who share an engine: what benchmarks/side_channel.py and benchmarks/influence.py write."""

from __future__ import annotations

from pydantic import Field

from jointkv.report.record import Record, Result


class ToldApart(Record):
    """One number that an attacker sees in one case, see `jointkv.evaluate.side_channel.Separation`.

    Attributes:
        varies: whether it had more than one value.
        found: whether the classes were told apart, at the file's level over all its tests.
    """

    arm: str
    scenario: str
    guess: str
    salts: str
    observable: str
    auc: float
    low: float
    high: float
    resident: int
    varies: bool
    found: bool


class SideChannel(Result):
    """What an attacker learns from timing and from what the server tells.

    Attributes:
        observables: their meanings by name.
        tests, level, smallest_auc: tests that share the level, and the AUC that one of them finds in 8 of 10 runs.
    """

    FORMAT = "jointkv.side_channel/1"
    model: str
    observables: dict[str, str]
    tests: int
    level: float
    smallest_auc: float
    smallest_auc_single_test: float
    rows: list[ToldApart]


class RowBound(Record):
    """The largest bound on an attention row, and the largest that happened."""

    bound: float
    actual: float
    holds: bool


class Attackers(Record):
    """What some attackers did to one victim under one bound; lists hold one entry per attacker."""

    victim: int
    bound: float
    attacker: str
    kl: list[float]
    kl_worst_token: list[float]
    changed: list[float]
    blocks: list[int]
    block_error: list[float]
    token_error: list[float]
    rows: dict[str, RowBound] = Field(default_factory=dict)


class Influence(Result):
    """How far one tenant's content moved another's next-token distributions."""

    FORMAT = "jointkv.influence/1"
    model: str
    search_budget: int
    rows: list[Attackers]

    def conflict(self, other: Result) -> str | None:
        """Another model."""
        assert isinstance(other, Influence)
        return None if self.model == other.model else f"model {self.model} and {other.model}"
