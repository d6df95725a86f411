"""What requests find in the store, and what of them is offered to it.

The store is asked in a thread when a request arrives. What it has beyond the prefix cache is loaded before the request
starts, by vLLM's own way for pages that come from elsewhere. Only pages that hold exactly what their text stands for
are offered, and requests find those of their own isolation key alone.
"""

from __future__ import annotations

import functools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from jointkv.errors import IntegrityError
from jointkv.store.folder import Store
from jointkv.store.names import FIRST, Named, Names
from jointkv.system.background import Background, within
from jointkv.vllm_plugin.engine.opt_out import left_alone
from jointkv.vllm_plugin.engine.tables import BlockTables
from jointkv.vllm_plugin.messages import Load, Save
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.requests import IsolationKey, Requests, isolation_key

logger = init_logger(f"vllm.{__name__}")

LOOK_UP_S = 1.0
"""A request whose look-up takes longer is computed, and so are those that come before it has ended."""

REMEMBERED = 1 << 16
"""Pages that were offered lately, which are not offered again."""

GROUP = 0
UNKNOWN = -1
R = TypeVar("R")


def harmless(hook: Callable[..., R]) -> Callable[..., R | None]:
    """An error inside `hook` ends the use of the store; requests go on."""

    @functools.wraps(hook)
    def guarded(self: StoredText, *args: Any) -> R | None:
        if self.off:
            return None
        try:
            return hook(self, *args)
        except Exception as error:
            self.end(f"{hook.__name__}: {type(error).__name__}: {error}")
            logger.debug("where it happened", exc_info=True)
            return None

    return guarded


@dataclass
class _Asked:
    """A request and what the store is known to have of it.

    Attributes:
        names: of its blocks.
        named: of those of which all tokens are known, as far as they were needed.
        stored: whole blocks from its first on, once the look-up is done.
        began: when the store was asked.
        offered: blocks that are stored or were offered.
        decided: whether it has started, or is loading; it is asked for no more.
    """

    request: Request
    names: Names
    stored: Future[int]
    began: float
    named: list[Named] = field(default_factory=list)
    offered: int = 0
    decided: bool = False

    def blocks(self, end: int, block_size: int) -> list[Named]:
        """The first `end` blocks."""
        known = len(self.named)
        if end > known:
            tokens = self.request.all_token_ids[known * block_size : end * block_size]
            self.named += self.names.of(tokens, block_size, self.named[-1].address if known else FIRST)
        return self.named[:end]


class StoredText:
    """The scheduler's side of a store.

    Args:
        store: what is asked; it is not written here.
        model: see `engine.stored.stored_model`.
        tables: vLLM's.
        requests: say what of a request is exact.
        statistics: counts.
        strict: whether requests without a salt are left alone.

    Attributes:
        off: whether the store is used no more, until the engine is started again.
    """

    def __init__(
        self, store: Store, model: str, tables: BlockTables, requests: Requests, statistics: Statistics, strict: bool
    ) -> None:
        self.off = False
        self._store, self._model, self._strict = store, model, strict
        self._tables, self._requests, self._statistics = tables, requests, statistics
        self._block_size = requests.block_size
        self._asked: dict[str, _Asked] = {}
        self._loads: list[Load] = []
        self._loading: dict[bytes, str] = {}
        """Who loads, by the address of the first page."""
        self._offered: OrderedDict[bytes, None] = OrderedDict()
        self._hash_map = tables.pool.cached_block_hash_to_block
        self._emptied = False
        self._thread = Background("jointkv-store-look-up")
        self._asking: deque[_Asked] = deque()

    @harmless
    def admit(self, request: Request) -> None:
        """Ask the store for a new request."""
        isolation = isolation_key(request)
        if not self._takes_part(request, isolation):
            return
        names = Names(self._store.secret, self._model, isolation)
        tokens, began, stored = request.prompt_token_ids, time.monotonic(), Future[int]()
        if self._hangs(began):
            stored.set_result(0)
        else:
            stored = self._thread.submit(self._look_up, names, tokens)
        asked = self._asked[request.request_id] = _Asked(request, names, stored, began)
        self._asking.append(asked)

    def matched(self, request: Request, computed: int) -> int | None:
        """Tokens of `request` beyond the first `computed` that can be loaded; None while that is not known.

        Or while another request loads the same: it is found in the prefix cache then.
        """
        found = self._matched(request, computed)
        return None if found == UNKNOWN else found or 0

    @harmless
    def _matched(self, request: Request, computed: int) -> int:
        asked = self._asked.get(request.request_id)
        if asked is None or asked.decided or self._private_from(request) is not None:
            return 0
        if not asked.stored.done():
            return 0 if time.monotonic() - asked.began > LOOK_UP_S else UNKNOWN
        # Of what is to be answered one token must be computed.
        most = min(asked.stored.result(), (request.num_tokens - 1) // self._block_size)
        first = computed // self._block_size
        if most > first and asked.blocks(first + 1, self._block_size)[first].address in self._loading:
            return UNKNOWN
        return max(most * self._block_size - computed, 0)

    def lend(self, request: Request, helper: Request) -> None:
        """`helper` loads what was found for `request`, which itself loads no more."""
        asked = self._asked[request.request_id]
        asked.decided, asked.offered = True, self._there(asked)
        self._asked[helper.request_id] = _Asked(helper, asked.names, asked.stored, asked.began)

    def allocate(self, request: Request, pages: Sequence[int], found: int, loaded: int) -> None:
        """`request` holds `pages`; of its first tokens `found` are there, and the `loaded` that follow are promised."""
        asked = self._asked.get(request.request_id)
        if loaded:
            first, end = found // self._block_size, (found + loaded) // self._block_size
            named = [] if asked is None else self._named(asked, end)[first:]
            index = np.array(pages[first:end], np.int64)
            self._loads.append(Load(request.request_id, index, [block.address for block in named]))
            if named:
                self._loading[named[0].address] = request.request_id
        if asked is not None and not asked.decided:
            asked.decided = True
            asked.offered = self._there(asked)
            self._statistics.add("store_hits" if loaded else "store_misses")
            self._statistics.add("store_tokens_loaded", loaded)

    def note_loaded(self, request_ids: Iterable[str]) -> None:
        """The loads of requests have ended, well or not."""
        ended = set(request_ids)
        if ended:
            self._loading = {first: name for first, name in self._loading.items() if name not in ended}

    def take_loads(self) -> list[Load]:
        """What workers are to load, once."""
        loads, self._loads = self._loads, []
        return loads

    @harmless
    def offers(self, output: SchedulerOutput) -> Save | None:
        """Pages that will be full after the step that `output` describes, exact, and not stored as far as is known."""
        pages: list[int] = []
        named: list[Named] = []
        positions: list[int] = []
        for request_id, scheduled in output.num_scheduled_tokens.items():
            asked = self._asked.get(request_id)
            if asked is None:
                continue
            request = asked.request
            # With asynchronous scheduling the last tokens are placeholders: their text is not known yet.
            end = min(request.num_computed_tokens + scheduled, request.num_tokens) // self._block_size
            private_from = self._private_from(request)
            if private_from is not None:
                end = min(end, private_from // self._block_size)
            for slot in range(asked.offered, end):
                block, name = self._tables.block(request_id, GROUP, slot), asked.blocks(end, self._block_size)[slot]
                if block is None or block.is_null:
                    raise IntegrityError(f"{request_id} does not hold the page of slot {slot}")
                if self._is_new(name.address):
                    pages.append(block.block_id)
                    named.append(name)
                    positions.append(slot * self._block_size)
            asked.offered = max(asked.offered, end)
        return Save(np.array(pages, np.int64), named, np.array(positions, np.int64)) if pages else None

    def take_emptied(self) -> bool:
        """Whether the prefix cache was emptied since the last call; the worker then looks at its weights."""
        before, self._hash_map = self._hash_map, self._tables.pool.cached_block_hash_to_block
        emptied, self._emptied = self._emptied or before is not self._hash_map, False
        return emptied

    def reset(self) -> None:
        """Weights may have changed."""
        self._emptied = True

    def dismiss(self, request_id: str) -> None:
        """A request has ended. Pages that it still loads stay its own until the worker is done."""
        self._asked.pop(request_id, None)
        self.note_loaded([request_id])

    def end(self, fault: str) -> None:
        """Use the store no more."""
        if not self.off:
            self.off = True
            self._statistics.add("store_faults")
            logger.error("jointkv reads and writes no stored pages until it is started again: %s", fault)

    def worker_failed(self) -> None:
        """A worker has given the store up, counted and said so."""
        self.off = True

    def close(self) -> None:
        """No more threads, no open files."""
        self.off = True
        self._thread.stop()
        within(LOOK_UP_S, self._store.close)

    def _hangs(self, now: float) -> bool:
        """Whether the disk has not answered for too long."""
        while self._asking and self._asking[0].stored.done():
            self._asking.popleft()
        return bool(self._asking) and now - self._asking[0].began > LOOK_UP_S

    def _look_up(self, names: Names, tokens: Sequence[int]) -> int:
        """How many whole blocks of a prompt are stored, from its first on."""
        there = self._store.has([block.address for block in names.of(tokens, self._block_size)])
        return there.index(False) if False in there else len(there)

    def _there(self, asked: _Asked) -> int:
        done = asked.stored.done() and asked.stored.exception() is None
        return asked.stored.result() if done else 0

    def _named(self, asked: _Asked, end: int) -> list[Named]:
        """The first `end` blocks; none after an error: what was promised must still be answered for."""
        try:
            return asked.blocks(end, self._block_size)
        except Exception as error:
            self.end(f"{type(error).__name__}: {error}")
            return []

    def _takes_part(self, request: Request, isolation: IsolationKey) -> bool:
        """Adapters and media go by names, which may stand for something else after a restart."""
        if left_alone(request) is not None or isolation.adapter is not None or isolation.media:
            return False
        return not self._strict or bool(request.cache_salt)

    def _private_from(self, request: Request) -> int | None:
        tracked = self._requests.find(request.request_id)
        return None if tracked is None else tracked.private_from

    def _is_new(self, address: bytes) -> bool:
        """Whether a page was not offered lately; it counts as offered from now on."""
        if address in self._offered:
            return False
        self._offered[address] = None
        if len(self._offered) > REMEMBERED:
            self._offered.popitem(last=False)
        return True
