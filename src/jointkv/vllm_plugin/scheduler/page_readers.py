"""The gauge of pages by how many table entries read them."""

from __future__ import annotations

from collections import Counter

from jointkv.vllm_plugin.engine.tables import BlockTables
from jointkv.vllm_plugin.metrics import REPORT_EVERY

PAGES_A_STEP = 1 << 13
"""That are looked at: a large pool takes several steps, so that none of them is long."""


class PageReaders:
    """Counts, again and again.

    Args:
        tables: whose pages.
    """

    def __init__(self, tables: BlockTables) -> None:
        self._tables = tables
        self._steps = 0
        self._next: int | None = None
        self._found: Counter[int] = Counter()

    def after_step(self) -> Counter[int] | None:
        """Look at some pages; number of pages by readers, once all were looked at."""
        self._steps += 1
        if self._next is None and self._steps % REPORT_EVERY == 1:
            self._next, self._found = 0, Counter()
        if self._next is None:
            return None
        first, self._next = self._next, self._next + PAGES_A_STEP
        self._found += self._tables.shared_pages(first, self._next)
        if self._next < self._tables.pool.num_gpu_blocks:
            return None
        self._next = None
        return self._found
