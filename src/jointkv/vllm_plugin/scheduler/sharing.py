"""Letting a slot of a request read another's page: the one place where that happens."""

from __future__ import annotations

from collections.abc import Sequence

from jointkv.vllm_plugin.engine.runners.base import Remap
from jointkv.vllm_plugin.engine.tables import BlockTables
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest


class Sharing:
    """Changes the scheduler's tables and keeps what the workers must be told.

    Args:
        tables: vLLM's.
        block_size: tokens per page.
    """

    def __init__(self, tables: BlockTables, block_size: int) -> None:
        self.tables = tables
        self._block_size = block_size
        self._remaps: list[Remap] = []

    def refused(self, tracked: TrackedRequest, epoch: int, group: int, slot: int, own: int) -> str | None:
        """Why page `own`, as `tracked` held it in `epoch`, cannot be given up now; None if it can."""
        return self.tables.may_replace(tracked.request, epoch, group, slot, own)

    def share(self, tracked: TrackedRequest, group: int, slot: int, page: int, *, exact: bool, step: int) -> None:
        """Read `page` at `slot` of `tracked` from now on, and give the old page back to the pool.

        What follows is for others no longer what its text stands for, unless the two pages are equal.

        Args:
            exact: whether they are.
            step: whose verdict allows it.
        """
        entry, start = (tracked.request.request_id, group, slot), slot * self._block_size
        held = self.tables.block(*entry)
        assert held is not None
        own, private_from = held.block_id, tracked.private_from
        new = not exact and (private_from is None or start < private_from)
        if self.tables.prefix_caching and new:
            self.tables.make_private(tracked.request, start, private_from, tracked.secret)
            tracked.private_from = start
        try:
            self.tables.replace(*entry, page)
        finally:  # whatever goes wrong, the workers' tables must follow the scheduler's
            block = self.tables.block(*entry)
            if block is not None and block.block_id == page:
                self._remaps.append(Remap(*entry, page, own, step))
        if tracked.private_from is not None and start >= tracked.private_from:
            self.tables.answer_for(tracked.request, start, private_from if new else start + self._block_size)
        tracked.served.add((group, slot))

    def adopt(self, tracked: TrackedRequest, group: int, first: int, pages: Sequence[int]) -> None:
        """Let `tracked`, of which nothing is computed yet, find `pages` in the prefix cache from slot `first` on.

        By hashes that only it has: neither they nor what is computed behind them is what an exact hash promises. The
        pool may still hand the pages out before the request is scheduled; then it finds fewer.
        """
        start = first * self._block_size
        if tracked.private_from is None or start < tracked.private_from:
            self.tables.make_private(tracked.request, start, tracked.private_from, tracked.secret)
            tracked.private_from = start
        for slot, page in enumerate(pages, first):
            self.tables.lead_to(tracked.request, group, slot, page)

    def take_remaps(self) -> list[Remap]:
        """What the workers must be told, once."""
        remaps, self._remaps = self._remaps, []
        return remaps

    def started(self, tracked: TrackedRequest) -> None:
        """Private hashes of a request that starts or comes back lead to the pages that it holds, and to no others.

        A page that it has adopted, or that served it before, may still be there although the request did not find it
        and computes its block: the hash would lead to a page that the request now reads as it stands, whatever factors
        it had.
        """
        if tracked.private_from is not None:
            self.tables.forget(tracked.request, tracked.private_from)
            self.tables.answer_for(tracked.request, tracked.private_from, None)

    def part(self, tracked: TrackedRequest, found: int) -> bool:
        """Whether a request that would find `found` tokens finds private pages among them; not again."""
        if tracked.private_from is None or found <= tracked.private_from:
            return False
        self.tables.forget(tracked.request, tracked.private_from)
        return True

    def let_go(self, tracked: TrackedRequest) -> None:
        """`tracked`, of which nothing is computed yet, finds nothing any more of what it has adopted.

        What it computes then is again what exact hashes promise.
        """
        if tracked.private_from is not None:
            self.tables.dismiss(tracked.request, tracked.private_from)
            self.tables.make_exact(tracked.request)
            tracked.private_from = None

    def forget(self, tracked: TrackedRequest) -> None:
        """No page answers for the private hashes of a request that has ended."""
        if tracked.private_from is not None:
            self.tables.dismiss(tracked.request, tracked.private_from)
