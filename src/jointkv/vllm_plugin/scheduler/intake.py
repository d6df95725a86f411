"""Requests that wait for what they need not compute, and the helpers that they wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from vllm.v1.request import Request

from jointkv.core.reuse import COMPUTED, Integers, ReusePlan, Run, Runs
from jointkv.policy.reuse import Search
from jointkv.vllm_plugin.engine.pages import NULL_PAGE
from jointkv.vllm_plugin.scheduler.licences import PageClass
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest
from jointkv.vllm_plugin.scheduler.resident_text import ResidentText


@dataclass
class Helper:
    """A request of the plugin's own, which computes up to a gap's end, or loads a prefix.

    Attributes:
        request: vLLM's.
        owner: name of the request that it helps.
        end: the slot behind the last that it brings.
        loads: whether it has begun to load.
        stray: nobody waits for it.
        ended: no longer known to vLLM.
    """

    request: Request
    owner: str
    end: int
    loads: bool = False
    stray: bool = False
    ended: bool = False


class Helped(NamedTuple):
    """What helpers have brought of the tokens that a request finds when it starts.

    Attributes:
        request_id: whose.
        computed, loaded: tokens.
    """

    request_id: str
    computed: int
    loaded: int


@dataclass
class Intake:
    """A request that waits until what it need not compute is decided.

    Attributes:
        text: where its text is resident.
        runs: of which too little is known without their entry blocks.
        resident: slots that may be reused, int64 `[n]`.
        end: the slot behind the last one that may be reused; one token at least is computed.
        plan: what is decided so far.
        search: where the next entry block is looked for.
        classes: of the pages that it may read, by licences.
        entry: slot of the next run's entry block; None when all is decided.
        sources: of that run.
        helpers: names of those it waits for.
        covered: blocks that were found or that helpers have computed.
        asked: whether its entry block is being compared.
        helped: tokens that helpers have computed.
        begun: whether its turn has come.
        filled: slots that read text from another position.
        in_place: those of them that read it where it is, and what, by a number of `text`.
        needs_pages: free ones, to start, as was counted when pages were written for it; 0 before.
        short: whether the pool has too few free pages for what is to be written.
    """

    tracked: TrackedRequest
    text: ResidentText
    runs: Runs
    resident: Integers
    end: int
    plan: ReusePlan
    search: Search
    classes: frozenset[PageClass] = frozenset()
    entry: int | None = None
    sources: list[Run] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)
    covered: int = 0
    asked: bool = False
    helped: int = 0
    begun: bool = False
    filled: set[int] = field(default_factory=set)
    in_place: dict[int, int] = field(default_factory=dict)
    needs_pages: int = 0
    short: bool = False

    @property
    def needs(self) -> int:
        """Blocks that the request is to find when it starts."""
        return max((stretch.stop for stretch in self.plan.reused), default=0)

    def read_in_place(self, slots: Integers) -> None:
        """Let `slots [n]`, whose text stands elsewhere, read it there: in the plan they have no page."""
        self.in_place.update(zip(slots.tolist(), self.plan.pages[slots].tolist(), strict=True))
        self._let_read(slots, NULL_PAGE)

    def compute_in_place(self) -> None:
        """Let what was to be read in place be computed."""
        self._let_read(np.array(list(self.in_place), np.int64), COMPUTED)
        self.filled -= self.in_place.keys()
        self.in_place = {}

    def sources_in_place(self) -> set[int]:
        """Pages that hold what is to be read in place."""
        fills = self.text.fills(np.array(list(self.in_place.values()), np.int64)) if self.in_place else None
        return set() if fills is None else {*fills.first.tolist(), *fills.second.tolist()}

    def _let_read(self, slots: Integers, page: int) -> None:
        pages = self.plan.pages.copy()
        pages[slots] = page
        self.plan = replace(self.plan, pages=pages)

    @property
    def gap_ends(self) -> list[int]:
        """Where gaps end that are not covered yet; up to the next entry block, while there is one."""
        until = self.end if self.entry is None else self.entry
        ends = [gap.stop for gap in self.plan.gaps if self.covered < gap.stop <= until]
        if self.entry is not None and self.entry + 1 > self.covered:
            ends.append(self.entry + 1)
        return ends

    def adopted(self, table: Sequence[int]) -> list[int]:
        """Slots that read the pages of the plan where the request has found those of `table`.

        A page that was handed out meanwhile has been computed anew, by a helper or by the request itself.
        """
        reused = (slot for stretch in self.plan.reused for slot in stretch if slot < len(table))
        return [slot for slot in reused if table[slot] == self.plan.pages[slot]]

    @property
    def ahead(self) -> int:
        """Tokens still to be computed before its first answer, if all that is undecided is reused."""
        blocks = self.covered + int(np.count_nonzero(self.resident >= self.covered)) - (self.entry is not None)
        return self.tracked.request.num_tokens - blocks * self.tracked.block_size
