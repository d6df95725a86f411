"""A vLLM whose interface differs is refused at start, with every difference named; the installed one is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core import (
    block_pool,
    kv_cache_coordinator,
    kv_cache_manager,
    kv_cache_utils,
    single_type_kv_cache_manager,
)
from vllm.v1.core.sched import request_queue, scheduler
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.request import Request
from vllm.v1.worker import gpu_input_batch, gpu_model_runner

from jointkv.errors import UnsupportedEngine
from jointkv.vllm_plugin.connector import PARTS
from jointkv.vllm_plugin.engine.uses import always, check_interfaces, used, vllm_version
from tests.vllm_plugin.engines import engine

HAZARD = pytest.mark.hazard(
    "Compatibility", "vLLM has changed an interface", "the engine does not start; the message names every difference"
)


@HAZARD
def test_the_installed_version_is_accepted(record_property: Callable[[str, object], None]) -> None:
    check_interfaces(PARTS)
    uses = [*always(), *(use for part in used().OVERRIDDEN.values() for use in part)]
    record_property("interfaces looked at", sum(len(f"{use.members} {use.overridden}".split()) for use in uses))


@HAZARD
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (block_pool.BlockPool, "touch"),
        (block_pool.BlockPool, "free_blocks"),
        (block_pool.BlockPool, "_insert_block_hash"),
        (block_pool.BlockHashToBlockMap, "pop"),
        (kv_cache_utils.KVCacheBlock, "reset_hash"),
        (kv_cache_utils.FreeKVCacheBlockQueue, "get_all_free_blocks"),
        (gpu_model_runner.GPUModelRunner, "synchronize_input_prep"),
        (Request, "num_tokens"),
        (kv_cache_manager.KVCacheManager, "get_computed_blocks"),
        (request_queue.RequestQueue, "prepend_requests"),
        (PrefillStats, "set"),
        (KVConnectorBase_V1, "bind_kv_cache_manager"),
        (KVConnectorBase_V1, "update_connector_output"),
    ],
)
def test_something_is_gone(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(UnsupportedEngine, match=f"{owner.__name__} has no {name}") as refusal:
        check_interfaces(PARTS)
    assert vllm_version() in str(refusal.value) and "Install a tested version" in str(refusal.value)


@HAZARD
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (kv_cache_manager.KVCacheManager, "coordinator"),
        (kv_cache_coordinator.KVCacheCoordinator, "single_type_managers"),
        (single_type_kv_cache_manager.SingleTypeKVCacheManager, "req_to_blocks"),
        (single_type_kv_cache_manager.SingleTypeKVCacheManager, "num_cached_block"),
        (block_pool.BlockPool, "cached_block_hashes_by_block"),
        (block_pool.BlockPool, "free_block_queue"),
        (Request, "num_preemptions"),
        (Request, "skip_reading_prefix_cache"),
        (scheduler.Scheduler, "max_num_scheduled_tokens"),
        (gpu_input_batch.InputBatch, "req_id_to_index"),
    ],
)
def test_an_attribute_of_objects_has_another_name(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    code = owner.__init__.__code__
    renamed = code.replace(co_names=tuple("renamed" if each == name else each for each in code.co_names))
    monkeypatch.setattr(owner.__init__, "__code__", renamed)
    with pytest.raises(UnsupportedEngine, match=f"has no {name}"):
        check_interfaces(PARTS)


@HAZARD
def test_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(self: Any, blocks: Any, group: int) -> None: ...

    def insert(self: Any, key: Any, block: Any) -> None: ...

    monkeypatch.setattr(block_pool.BlockPool, "touch", touch)
    monkeypatch.setattr(block_pool.BlockPool, "_insert_block_hash", insert)
    with pytest.raises(UnsupportedEngine, match=r"BlockPool.touch is not called .*'group'.*num_tokens"):
        check_interfaces(PARTS)


@HAZARD
def test_a_hook_of_the_connector_that_is_called_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    def matched(self: Any, request: Any, num_computed_tokens: int, block_hashes: Any) -> None: ...

    monkeypatch.setattr(KVConnectorBase_V1, "get_num_new_matched_tokens", matched)
    with pytest.raises(UnsupportedEngine, match=r"get_num_new_matched_tokens passes block_hashes"):
        check_interfaces(PARTS)


@HAZARD
def test_a_scheduler_that_is_called_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    def schedule(self: Any, throttle_prefills: bool = False, budget: int = 0) -> None: ...

    monkeypatch.setattr(scheduler.Scheduler, "schedule", schedule)
    with pytest.raises(UnsupportedEngine, match=r"Scheduler.schedule passes budget"):
        check_interfaces(PARTS)


@HAZARD
def test_helpers_cannot_be_made_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any, request_id: str, prompt_token_ids: Any, sampling_params: Any, pooling_params: Any) -> None: ...

    monkeypatch.setattr(Request, "__init__", other)
    with pytest.raises(UnsupportedEngine, match=r"request.Request is not called as .*client_index"):
        check_interfaces(PARTS)


@HAZARD
def test_a_real_engine_says_it_at_its_start(calm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(block_pool.BlockHashToBlockMap, "contain", raising=False)
    monkeypatch.setattr(block_pool.BlockPool, "get_usage", lambda self, kind: 0.0)
    with pytest.raises(UnsupportedEngine, match=r"BlockPool.get_usage is not called"), engine(calm, fusion={}):
        pass
