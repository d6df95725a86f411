"""Routers hear of pages that others may look up, and of no others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import BlockHash, get_block_hash, maybe_convert_block_hash

from jointkv.vllm_plugin.engine.events import PrivateEvents
from tests.vllm_plugin.engines import LOSSY, Engine, engine, near_prefix

SIZE = 4
HASHES = [bytes([number]) * 32 for number in range(6)]
OUT = 40


def stored(first: int, *numbers: int, tokens: int | None = None) -> BlockStored:
    """An event on blocks of `HASHES` behind block `first - 1`."""
    names = [maybe_convert_block_hash(BlockHash(HASHES[number])) for number in numbers]
    parent = maybe_convert_block_hash(BlockHash(HASHES[first - 1])) if first else None
    count = len(names) * SIZE if tokens is None else tokens
    keys: list[Any] = [("salt",) if number == 0 else None for number in numbers]
    return BlockStored(names, parent, list(range(count)), SIZE, None, "GPU", None, extra_keys=keys, group_idx=0)


def removed(*numbers: int) -> BlockRemoved:
    return BlockRemoved([maybe_convert_block_hash(BlockHash(HASHES[number])) for number in numbers], "GPU", 0)


def published(events: PrivateEvents, *queue: Any) -> list[Any]:
    events._pool.kv_event_queue = list(queue)
    events.withhold()
    return events._pool.kv_event_queue


@pytest.fixture
def events() -> PrivateEvents:
    """Of a pool with a request whose blocks are private from the third on."""
    made = PrivateEvents(SimpleNamespace(enable_kv_cache_events=True, kv_event_queue=[]))
    made.hide([BlockHash(HASHES[2]), BlockHash(HASHES[3])])
    return made


def test_what_is_stored_ends_before_the_first_private_block(events: PrivateEvents) -> None:
    assert published(events, stored(0, 0, 1, 2, 3)) == [stored(0, 0, 1)]
    assert published(events, stored(0, 0, 1), AllBlocksCleared()) == [stored(0, 0, 1), AllBlocksCleared()]
    assert published(events, stored(0, 2), stored(2, 2, 3)) == []


def test_what_is_chained_to_a_private_block_is_private(events: PrivateEvents) -> None:
    assert published(events, stored(4, 4)) == [] and published(events, stored(5, 5), removed(4), removed(5)) == []


def test_what_is_removed_is_named_only_if_it_was_stored(events: PrivateEvents) -> None:
    assert published(events, removed(0), removed(2), removed(1, 3)) == [removed(0), removed(1)]


def test_tokens_that_do_not_add_up_are_not_told(events: PrivateEvents) -> None:
    """Windows leave blocks out between others."""
    assert published(events, stored(0, 0, 2, tokens=3 * SIZE)) == []


def test_hashes_of_a_request_that_has_ended_are_forgotten_after_its_last_events(events: PrivateEvents) -> None:
    events.forget([BlockHash(HASHES[2]), BlockHash(HASHES[3])])
    assert published(events, stored(2, 2)) == [] and published(events, stored(0, 2)) == [stored(0, 2)]


def test_without_events_nothing_is_kept() -> None:
    made = PrivateEvents(SimpleNamespace(enable_kv_cache_events=False, kv_event_queue=[]))
    made.hide([BlockHash(HASHES[2])])
    assert not made._private


@pytest.mark.parametrize("fusion", [LOSSY, {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}], ids=["off", "on"])
def test_a_real_engine_tells_of_nothing_that_it_would_not_find(calm: Path, bold: None, fusion: dict[str, Any]) -> None:
    config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    with engine(calm, 90, fusion, kv_events_config=config, max_model_len=512) as served:
        router, private = Router(), Private(served)
        served.vllm_scheduler.kv_event_publisher = router

        def check(_: Engine) -> None:
            held = {
                maybe_convert_block_hash(get_block_hash(key)) for key in served.pool.cached_block_hash_to_block._cache
            }
            assert router.known <= held - private.hashes

        served.watchers.append(check)
        for seed in range(2):
            prompts = near_prefix(6, shared=320, head=32, seed=seed)
            served.generate(prompts[:1], OUT)
            served.generate(prompts[1:], OUT)
        assert router.known and private.hashes and served.statistics["blocks_merged"] > 0
        assert (served.statistics["prompt_tokens_skipped"] > 0) == ("reuse" in fusion)
        assert not served.side.tables.events._private
        served.assert_drained()


class Router:
    """What it believes to be in the prefix cache."""

    def __init__(self) -> None:
        self.known: set[Any] = set()

    def publish(self, batch: Any) -> None:
        for event in batch.events:
            (self.known.update if isinstance(event, BlockStored) else self.known.difference_update)(event.block_hashes)

    def shutdown(self) -> None:
        pass


class Private:
    """All hashes that only one request ever had."""

    def __init__(self, served: Engine) -> None:
        self.hashes: set[Any] = set()
        make, dismiss = served.side.tables.make_private, served.side.tables.dismiss

        def made(request: Any, start: int, *more: Any) -> None:
            make(request, start, *more)
            self._note(request, start)

        def dismissed(request: Any, start: int) -> None:
            self._note(request, start)
            dismiss(request, start)

        served.side.tables.make_private, served.side.tables.dismiss = made, dismissed

    def _note(self, request: Any, start: int) -> None:
        self.hashes.update(maybe_convert_block_hash(one) for one in request.block_hashes[start // 32 :])
