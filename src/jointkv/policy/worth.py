"""Whether it pays to compare entry blocks: what is skipped behind them, against the steps that they take."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from jointkv.system.recent import Recent

WORTH = 64
"""Tokens that each must save on average. Each takes a step of its own, for which the request waits; traffic that saved
42 for each had 0.93 of the throughput of computing everything (docs/results/table/edited_document.json)."""

ENOUGH = 16
"""Comparisons of which that is asked; with fewer nobody knows."""

RARELY = 8
"""Of so many requests one has its entry blocks compared where it does not pay, in case the traffic changes."""

REMEMBERED = 64
"""Comparisons after which what was counted counts half."""

MOST_KEYS = 4096
"""Isolation keys that are known at the most; the one that was not asked about for the longest time is forgotten."""


@dataclass
class _Account:
    compared: float = 0.0
    saved: float = 0.0
    passed_over: int = 0


class Worth:
    """What comparing entry blocks has brought, by isolation key: the requests of one say nothing of another's."""

    def __init__(self) -> None:
        self._accounts = Recent[Hashable, _Account](lambda isolation: _Account(), MOST_KEYS)

    def __len__(self) -> int:
        """Isolation keys that are known."""
        return len(self._accounts)

    def pays(self, isolation: Hashable) -> bool:
        """Whether the next request is to have its entry blocks compared."""
        account = self._accounts[isolation]
        if account.compared < ENOUGH or account.saved >= WORTH * account.compared:
            return True
        account.passed_over = (account.passed_over + 1) % RARELY
        return account.passed_over == 0

    def compared(self, isolation: Hashable, saved: int) -> None:
        """An entry block was compared, and `saved` tokens behind it, 0 or more, need not be computed."""
        account = self._accounts[isolation]
        account.compared += 1
        account.saved += saved
        if account.compared >= REMEMBERED:
            account.compared, account.saved = account.compared / 2, account.saved / 2
