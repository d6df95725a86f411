"""vLLM's KV-cache events, from which routers learn what a prefix cache holds, without what only one request finds."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import msgspec
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash


class PrivateEvents:
    """Takes private hashes out of the events of a pool before they are published.

    Args:
        pool: vLLM's, whose queue of events is what is changed.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._private: set[Hashable] = set()
        self._gone: set[Hashable] = set()

    @property
    def enabled(self) -> bool:
        """Whether there are any events."""
        return self._pool.enable_kv_cache_events

    def hide(self, hashes: Iterable[BlockHash]) -> None:
        """From now on `hashes`, and those that are chained to them, are private."""
        if self.enabled:
            self._private.update(map(maybe_convert_block_hash, hashes))

    def forget(self, hashes: Iterable[BlockHash]) -> None:
        """No page answers for `hashes` any more; what is in the queue already is taken out all the same."""
        if self.enabled:
            self._gone.update(map(maybe_convert_block_hash, hashes))

    def withhold(self) -> None:
        """Take private hashes out of what waits to be published."""
        if self._private and self._pool.kv_event_queue:
            kept = [self._public(event) for event in self._pool.kv_event_queue]
            self._pool.kv_event_queue = [event for event in kept if event is not None]
        self._private -= self._gone
        self._gone.clear()

    def _public(self, event: Any) -> Any:
        """What of `event` concerns others; None if nothing does."""
        if isinstance(event, BlockStored):
            return self._stored(event)
        if isinstance(event, BlockRemoved):
            hashes = [one for one in event.block_hashes if one not in self._private]
            return msgspec.structs.replace(event, block_hashes=hashes) if hashes else None
        return event

    def _stored(self, event: BlockStored) -> BlockStored | None:
        """The blocks before the first private one; all that follow it are chained to it."""
        hashes = event.block_hashes
        private = event.parent_block_hash in self._private
        first = 0 if private else next((at for at, one in enumerate(hashes) if one in self._private), len(hashes))
        if first == len(hashes):
            return event
        self._private.update(hashes[first:])
        if not first or len(event.token_ids) != len(hashes) * event.block_size:
            return None  # without its blocks in between, nobody could tell which tokens are whose
        extra = event.extra_keys and event.extra_keys[:first]
        tokens = event.token_ids[: first * event.block_size]
        return msgspec.structs.replace(event, block_hashes=hashes[:first], token_ids=tokens, extra_keys=extra)
