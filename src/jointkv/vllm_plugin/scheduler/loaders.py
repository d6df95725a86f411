"""What the store has of requests that may reuse: a helper loads it, and runs are looked for behind it.

A request that loads for itself is looked up no more by vLLM: it would find no run behind what it has loaded. So a
helper loads the prefix, whose pages then answer in vLLM's prefix cache like computed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.request import Request

from jointkv.vllm_plugin.engine.tables import BlockTables
from jointkv.vllm_plugin.scheduler.helpers import Helpers
from jointkv.vllm_plugin.scheduler.intake import Helper
from jointkv.vllm_plugin.scheduler.look_up import LookUp
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest
from jointkv.vllm_plugin.scheduler.stored import StoredText


@dataclass
class Waiting:
    """A request for which a prefix is loaded.

    Attributes:
        helper: loads it.
        found: tokens of it that were there before.
        pages: that the request takes in all.
    """

    helper: Helper
    found: int
    pages: int


class Loaders:
    """Has prefixes loaded before reuse is planned.

    Args:
        stored: says what there is; None where nothing outlives the engine, and nothing waits.
        look_up: says who may reuse.
        tables: vLLM's.
        sent: helpers.
        least: blocks behind a loaded prefix at the least for a run to begin there.

    Attributes:
        waiting: by name, until they start.
        asking: those of which it is not known yet in this step what the store has.
        full: whether the line is to end before the request that was looked at last: until there is room for it, or as
            many as can run at once wait for the store already.
    """

    def __init__(
        self, stored: StoredText | None, look_up: LookUp, tables: BlockTables, sent: Helpers, least: int
    ) -> None:
        self._stored, self._look_up, self._tables, self._sent, self._least = stored, look_up, tables, sent, least
        self.waiting: dict[str, Waiting] = {}
        self.asking: set[str] = set()
        self.full = False
        self._passed: set[str] = set()
        self._seats = 0

    def new_step(self, seats: int) -> None:
        """Nobody has been looked at yet. At most `seats` requests can run at once."""
        self.asking.clear()
        self._passed.clear()
        self.full, self._seats = False, seats

    def ahead_of(self, tracked: TrackedRequest) -> list[Request] | None:
        """Helpers to send ahead of `tracked`, of which the store has or may have more; None where reuse is planned.

        Where nothing could be reused behind what the store has, it loads for itself.
        """
        request, name, size = tracked.request, tracked.request.request_id, tracked.block_size
        waits = self.waiting.get(name)
        if waits is not None:
            self._passed.add(name)
            if not waits.helper.ended:
                return []
            self._tables.renew(self._tables.found_pages(request))  # others may start before it
            return None
        if self._stored is None or not self._look_up.may_reuse(tracked) or self._stored.matched(request, 0) == 0:
            return None
        found = self._tables.found(request)
        more = self._stored.matched(request, found)
        if more == 0:
            return None
        if len(self.asking) + len(self._passed) >= self._seats:
            self.full = True
            return []
        if more is None:
            self.asking.add(name)
            return []
        end = found + more
        if (request.num_tokens - 1 - end) // size < self._least:
            return []
        pages = -(-request.num_tokens // size)
        if self.waiting and pages > self._room:
            # Not where one of those stands behind it, and would wait for it in turn.
            self.full = self.waiting.keys() <= self._passed
            return []
        helper = self._sent.loader_of(request, end + 1, self._tables.pool.hash_block_size)
        self._stored.lend(request, helper.request)
        self.waiting[name] = Waiting(helper, found, pages)
        self._passed.add(name)
        return [helper.request]

    def holds(self, name: str) -> bool:
        """Whether a request is to wait."""
        waits = self.waiting.get(name)
        return name in self.asking or (waits is not None and not waits.helper.ended)

    def start(self, name: str, computed: int) -> int:
        """A request starts and has found `computed` tokens: how many of them were loaded for it."""
        waits = self.waiting.pop(name, None)
        if waits is None:
            return 0
        # The helper's last token is computed.
        return max(min(computed, waits.helper.request.num_prompt_tokens - 1) - waits.found, 0)

    def let_go(self, name: str) -> None:
        """A request waits no more, and nobody for its helper."""
        self.waiting.pop(name, None)
        self.asking.discard(name)
        self._sent.let_go(name)

    @property
    def _room(self) -> int:
        """Pages besides those that requests take which wait already."""
        loading = self._tables.of(waits.helper.request.request_id for waits in self.waiting.values())
        held = sum(len(table) for (table,) in loading.values())
        return self._tables.free + held - sum(waits.pages for waits in self.waiting.values())
