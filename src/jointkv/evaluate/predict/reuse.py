"""How much of some requests need not be computed: from their tokens alone, and with a model, by audits of them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from jointkv.core.blocks import PagedKV, served_errors
from jointkv.core.evidence import Known
from jointkv.core.reuse import COMPUTED, Integers
from jointkv.evaluate.advise.resident import Resident
from jointkv.evaluate.holding.prefilled import Prefilled
from jointkv.hf.residents import Matches, Residents
from jointkv.policy import FusionPolicy
from jointkv.policy.reuse import Computed, ReuseRule, decide
from jointkv.theory.licence import Licence

Ratios = Callable[[Integers, Integers], NDArray[np.float64]]
"""Of a request's blocks `slots [n]` from those in `pages [n]`: error over bound, `[n]`."""


@dataclass(frozen=True)
class Reusable:
    """Requests in their order, each of which may read the blocks of all before it.

    Attributes:
        requests, tokens: how many were looked at.
        exact_tokens: in blocks before which everything is equal too, as a prefix cache finds them.
        skipped_tokens: in blocks that would be read although something before them differs; entry blocks and stretches
            of few blocks are computed.
        moved_tokens: in further blocks whose text is resident at another position; unknown (None) by audits.
        runs: stretches of such blocks.
        blocks, missed_blocks: such blocks, and those of them that are beyond the bounds; nothing is known of these from
            tokens alone.
        miss_limit: upper confidence limit of the share of missed blocks, see `Licence`.
        granted: whether these audits would earn a licence.
    """

    requests: int
    tokens: int
    exact_tokens: int
    skipped_tokens: int
    runs: int
    blocks: int
    missed_blocks: int | None = None
    miss_limit: float | None = None
    granted: bool | None = None
    moved_tokens: int | None = None

    @property
    def moved_share(self) -> float:
        """Of the tokens, those that could be read besides, because they are resident at another position."""
        return (self.moved_tokens or 0) / self.tokens if self.tokens else 0.0

    @property
    def share(self) -> float:
        """Of the tokens, those that would be read although something before them differs."""
        return self.skipped_tokens / self.tokens if self.tokens else 0.0


def from_tokens(rows: Sequence[Sequence[int]], block_size: int, rule: ReuseRule | None = None) -> Reusable:
    """What could be skipped of requests (token ids) if every block were near enough: the most that reuse can do."""
    resident = Resident(block_size, None, (rule or ReuseRule()).least + 1)
    seen = [resident.request("", np.array(row, np.int64)) for row in rows]
    skipped = sum(each.same_tokens for each in seen)
    return Reusable(
        requests=len(rows),
        tokens=sum(each.tokens for each in seen),
        exact_tokens=sum(each.exact_tokens for each in seen),
        skipped_tokens=skipped,
        runs=sum(each.stretches for each in seen),
        blocks=skipped // block_size,
        moved_tokens=sum(each.moved_tokens for each in seen) if resident.finds_moved else None,
    )


def by_audits(
    batch: Prefilled,
    rows: Sequence[Sequence[int]],
    policy: FusionPolicy,
    licence: Licence,
    rule: ReuseRule | None = None,
) -> Reusable:
    """What would be skipped of requests that are all computed and compared, and how much of it is beyond the bounds.

    Args:
        batch: the requests `rows` (token ids), whole, each prefilled on its own.
        policy: with the bounds.
        licence: told the share of every request.
    """
    walk = _Walk(batch.block_size, rule or ReuseRule(), licence)
    layers = range(batch.layers)
    kv = PagedKV([batch.state[f"key.{i}"] for i in layers], [batch.state[f"value.{i}"] for i in layers])
    bounds = policy.rule(0)
    for row, table in zip(rows, batch.table, strict=True):
        own = table[: len(row) // batch.block_size]

        def ratios(slots: Integers, pages: Integers, own: torch.Tensor = own) -> NDArray[np.float64]:
            errors = served_errors(kv, own[torch.from_numpy(slots)], torch.from_numpy(pages), bounds.across_layers)
            return bounds.ratio([error.numpy() for error in errors])

        walk.request(row, own.numpy(), ratios)
    return walk.result()


class _Steps(Computed):
    """Nothing is computed or adopted: all is there."""

    def __init__(self, ratios: Ratios, residents: Residents, matches: Matches) -> None:
        self.ratios = ratios
        self._residents, self._matches = residents, matches

    def known(self, slots: Integers, pages: Integers) -> Known:
        return self._residents.known(self._matches, slots, pages)


class _Walk:
    """Requests one after another, and sums over them."""

    def __init__(self, block_size: int, rule: ReuseRule, licence: Licence) -> None:
        self._size, self._rule, self._licence = block_size, rule, licence
        self._residents = Residents(block_size)
        self._requests = self._tokens = self._exact = self._skipped = self._runs = self._missed = 0

    def request(self, row: Sequence[int], own: Integers, ratios: Ratios) -> None:
        """One more, whose blocks are in the pages `own`."""
        tokens = np.array(row, np.int64)
        matches = self._residents.find("", tokens[:-1])
        slots = max(0, len(tokens) - 1) // self._size
        steps = _Steps(ratios, self._residents, matches)
        plan = decide(matches.found, len(matches.exact), slots, self._rule, steps)
        reused = np.flatnonzero(plan.pages != COMPUTED)
        missed = int((ratios(reused, plan.pages[reused]) > 1).sum())
        if len(reused):
            self._licence.observe(missed / len(reused))
        self._witness(matches, ratios)
        self._residents.add("", tokens, np.arange(len(own)), own, self._requests)
        self._requests, self._tokens = self._requests + 1, self._tokens + len(tokens)
        self._exact += len(matches.exact) * self._size
        self._skipped += len(reused) * self._size
        self._runs, self._missed = self._runs + len(plan.reused), self._missed + missed

    def result(self) -> Reusable:
        """What was found."""
        return Reusable(
            requests=self._requests,
            tokens=self._tokens,
            exact_tokens=self._exact,
            skipped_tokens=self._skipped,
            runs=self._runs,
            blocks=self._skipped // self._size,
            missed_blocks=self._missed,
            miss_limit=self._licence.limit,
            granted=self._licence.granted,
        )

    def _witness(self, matches: Matches, ratios: Ratios) -> None:
        chosen = (matches.slot >= len(matches.exact)) & ~matches.same_context
        slot, page = matches.slot[chosen], matches.page[chosen]
        if len(slot):
            self._residents.witness(matches, slot, page, ratios(slot, page))
