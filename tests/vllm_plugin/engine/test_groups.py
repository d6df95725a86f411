"""Groups of layers, each with a block table of its own: grouping, decisions, counting, freeing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.request import Request

from jointkv.errors import UnsupportedEngine
from jointkv.vllm_plugin.engine.groups import LayerGroupManager, LayerGroupSpec, register, split_layers
from tests.hazards import FIRST
from tests.vllm_plugin.engines import Engine, engine, near_prefix

BLOCK = 32
SHAPE: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
PLAIN = FullAttentionSpec(**SHAPE)
GROUPED = LayerGroupSpec(**SHAPE)
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=64)


def grouped(specs: dict[str, KVCacheSpec], memory: int = 1 << 24) -> KVCacheConfig:
    """The pool and the tables that vLLM makes for layers with these specs."""
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
    )
    return get_kv_cache_config_from_groups(config, get_kv_cache_groups(config, specs), memory)


def layers(count: int, spec: KVCacheSpec = PLAIN, name: str = "full") -> dict[str, KVCacheSpec]:
    return {f"{name}.{number}": spec for number in range(count)}


class TestGrouping:
    def test_one_group_is_stock(self) -> None:
        specs = layers(4)
        assert split_layers(specs, 1) is specs

    @pytest.mark.parametrize("groups", [2, 3, 6])
    def test_groups_are_consecutive_layers_over_the_same_bytes(self, groups: int) -> None:
        stock, split = grouped(layers(6)), grouped(split_layers(layers(6), groups))
        names = [f"full.{number}" for number in range(6)]
        size = 6 // groups
        assert [group.layer_names for group in split.kv_cache_groups] == [
            names[start : start + size] for start in range(0, 6, size)
        ]
        assert {group.kv_cache_spec for group in split.kv_cache_groups} == {GROUPED}
        assert {tensor.size for tensor in split.kv_cache_tensors} == {split.num_blocks * PLAIN.page_size_bytes * size}
        # A page of one group is smaller, so as many tokens fit, but for what is left over.
        assert stock.num_blocks <= split.num_blocks // groups + 1 <= stock.num_blocks + 1

    def test_sliding_windows_keep_their_own_tables(self) -> None:
        specs = {}
        for number in range(4):
            specs |= {f"full.{number}": PLAIN, f"window.{number}": WINDOW}
        split = grouped(split_layers(specs, 2))
        by_kind = Counter(type(group.kv_cache_spec) for group in split.kv_cache_groups)
        assert by_kind == {LayerGroupSpec: 2, SlidingWindowSpec: 2}

    def test_refuses_a_number_that_does_not_divide(self) -> None:
        with pytest.raises(UnsupportedEngine, match=r"layer_groups=4 does not divide .* 6 layers .* 1, 2, 3, 6"):
            split_layers(layers(6), 4)

    def test_refuses_attention_that_is_not_plain(self) -> None:
        windowed = FullAttentionSpec(**SHAPE, sliding_window=64)
        with pytest.raises(UnsupportedEngine, match=r"window\.0 .* layer_groups=1"):
            split_layers(layers(2) | layers(2, windowed, "window"), 2)

    def test_registering_twice_is_harmless(self) -> None:
        register()
        register()


def tables(groups: int, pages: int, spec: KVCacheSpec = GROUPED) -> KVCacheManager:
    register()
    init_none_hash(sha256)
    config = KVCacheConfig(pages + 1, [], [KVCacheGroupSpec([f"layer.{n}"], spec) for n in range(groups)])
    return KVCacheManager(config, 4096, BLOCK, BLOCK, max_in_flight_tokens=4096)


def new_request(name: str, tokens: list[int]) -> Request:
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, tokens, SamplingParams(max_tokens=1000), None, block_hasher=hasher)


def admit(manager: KVCacheManager, request: Request, reading: int | None = None) -> bool:
    """Find the cached prefix of `request` and allocate `reading` tokens more (all of them by default)."""
    blocks, cached, _ = manager.get_computed_blocks(request)
    count = request.num_tokens - cached if reading is None else min(reading, request.num_tokens - cached)
    done = manager.allocate_slots(request, count, cached, blocks, full_sequence_must_fit=True) is not None
    if done:
        request.num_computed_tokens = cached + count
    return done


class TestManager:
    def test_vllm_uses_it(self) -> None:
        managers = tables(3, 30).coordinator.single_type_managers
        assert [type(manager) for manager in managers] == [LayerGroupManager] * 3
        assert managers[0].lockstep == list(managers) and managers[0].lockstep is managers[2].lockstep
        assert tables(2, 30).coordinator.single_type_managers[0].lockstep is not managers[0].lockstep

    @pytest.mark.parametrize("free", ["free", "pop_blocks_for_free"])
    def test_tails_of_all_groups_are_evicted_first(self, free: str) -> None:
        manager = tables(3, 12)
        request = new_request("a", list(range(4 * BLOCK)))
        assert admit(manager, request)
        held = manager.get_block_ids("a")
        if free == "free":
            manager.free(request)
        else:  # what the scheduler does when a step that still reads the pages is under way
            manager.block_pool.free_blocks(reversed(manager.pop_blocks_for_free(request)))
        order = [block.block_id for block in manager.block_pool.free_block_queue.get_all_free_blocks()]
        slots = [next(slot for slot in range(4) for table in held if table[slot] == page) for page in order]
        assert slots == [3] * 3 + [2] * 3 + [1] * 3 + [0] * 3
        # Whatever is evicted, the rest answers in every group.
        manager.block_pool.get_new_blocks(6)
        assert manager.get_computed_blocks(new_request("b", list(range(4 * BLOCK))))[1] == 2 * BLOCK

    def test_stock_tables_would_lose_the_prefix(self) -> None:
        manager = tables(3, 12, PLAIN)
        request = new_request("a", list(range(4 * BLOCK)))
        assert admit(manager, request)
        manager.free(request)
        manager.block_pool.get_new_blocks(6)
        assert manager.get_computed_blocks(new_request("b", list(range(4 * BLOCK))))[1] == 0

    @pytest.mark.parametrize("seed", range(5))
    def test_counts_like_the_stock_manager(self, seed: int) -> None:
        """The same requests get the same slots, or none, whichever manager keeps the tables."""
        rng = random.Random(seed)
        both = [tables(3, 60, spec) for spec in (GROUPED, PLAIN)]
        running: list[tuple[Request, Request]] = []
        for number in range(300):
            if running and rng.random() < 0.2:
                pair = running.pop(rng.randrange(len(running)))
                for manager, request in zip(both, pair, strict=True):
                    manager.free(request)
            elif rng.random() < 0.3:
                prompt = [rng.randrange(3)] * (BLOCK * rng.randrange(1, 4)) + [number] * rng.randrange(1, BLOCK)
                pair = (new_request(f"r{number}", prompt), new_request(f"r{number}", prompt))
                # Evicted in another order, prefixes that are found may differ, and with them what is left.
                for manager in both:
                    if not manager.block_pool.get_usage():
                        manager.reset_prefix_cache()
                admitted = [admit(manager, request) for manager, request in zip(both, pair, strict=True)]
                if all(admitted):
                    running.append(pair)
                else:
                    for manager, request in zip(both, pair, strict=True):
                        manager.free(request)
            for pair in running:
                needs = [
                    manager.coordinator.get_num_blocks_to_allocate(
                        request.request_id, len(pair[0].all_token_ids) + 40, ((), (), ()), 0, 0, 0, 0
                    )
                    for manager, request in zip(both, pair, strict=True)
                ]
                assert needs[0] == needs[1]
            for manager in both:
                entries = [set(group.req_to_blocks) for group in manager.coordinator.single_type_managers]
                assert entries[0] == entries[1] == entries[2] == {request.request_id for request, _ in running}
                assert [len(table) for table in manager.coordinator.single_type_managers[0].req_to_blocks.values()] == [
                    len(table) for table in manager.coordinator.single_type_managers[2].req_to_blocks.values()
                ]
        for pair in running:
            for manager, request in zip(both, pair, strict=True):
                manager.free(request)
        assert [manager.block_pool.get_num_free_blocks() for manager in both] == [60, 60]


def record_merges(served: Engine) -> list[tuple[int, int]]:
    """Group and slot of every merge from now on."""
    merges: list[tuple[int, int]] = []
    replace: Callable[..., None] = served.side.tables.replace

    def recorded(request_id: str, group: int, slot: int, page: int) -> None:
        merges.append((group, slot))
        replace(request_id, group, slot, page)

    served.side.tables.replace = recorded
    return merges


PROMPTS = near_prefix(8, shared=200, seed=3)


@pytest.fixture(scope="module")
def expected(lively: Path) -> list[list[int]]:
    """What the stock engine answers."""
    with engine(lively) as served:
        return served.generate(PROMPTS)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_off_is_stock(lively: Path, expected: list[list[int]], groups: int) -> None:
    with engine(lively, pages=200 * groups, fusion={"layer_groups": groups, "enabled": False}) as served:
        assert served.generate(PROMPTS) == expected
        # A page holds the layers of one group: the override counts those.
        assert served.core.vllm_config.cache_config.kv_cache_size_tokens == 200 * BLOCK
        served.assert_drained()


@pytest.mark.runs("layer groups", *FIRST)
@pytest.mark.parametrize("groups", [2, 4])
def test_every_group_decides_alone(lively: Path, expected: list[list[int]], groups: int) -> None:
    """In the first layer, equal tokens at equal positions have equal K and V; in the others they depend on the head."""
    options = {"layer_groups": groups, "max_relative_error": 0.0, "max_token_error": 0.0}
    with engine(lively, pages=200 * groups, fusion=options) as served:
        merges = record_merges(served)
        assert served.generate(PROMPTS) == expected
        by_group = Counter(group for group, _ in merges)
        assert (set(by_group) == {0}) if groups == 4 else not by_group
        assert served.statistics["blocks_merged"] == served.statistics["pages_freed"] == len(merges)
        served.assert_drained()


@pytest.mark.runs("layer groups", *FIRST)
def test_thresholds_belong_to_their_group(lively: Path) -> None:
    for bounds, merging in (((0.0, 2.0, 0.0, 2.0), {0, 1, 3}), ((0.0, 0.0, 2.0, 0.0), {0, 2})):
        options = {"layer_groups": 4, "max_relative_error": bounds, "max_token_error": None}
        with engine(lively, pages=800, fusion=options) as served:
            merges = record_merges(served)
            served.generate(PROMPTS)
            assert {group for group, _ in merges} == merging
            served.assert_drained()


def test_integrity_under_pressure(lively: Path) -> None:
    """Preemption, chunked prefill and prefix hits; tables and reference counts are checked at every step."""
    options = {"layer_groups": 4, "max_relative_error": (0.0, 1.5, 0.5, 1.5), "max_token_error": None}
    with engine(lively, pages=4 * 40, fusion=options, max_num_batched_tokens=256) as served:
        merges = record_merges(served)
        for seed in (1, 2):
            prompts = near_prefix(12, shared=150, seed=seed)
            served.generate(prompts + 3 * prompts[-1:], out=60)
        assert served.preempted and served.cached_tokens and merges
        assert served.statistics["state"] == "active" and not served.statistics["faults"]
        assert len(set(Counter(group for group, _ in merges).values())) > 1
        served.assert_drained()


def test_cached_prefixes_stay_exact(lively: Path) -> None:
    """After lossy merges in some groups, hits in the prefix cache give the tokens of an unfused engine."""
    prompts = near_prefix(6, shared=150, seed=5)
    longer = [prompt + [11] * 40 for prompt in prompts]
    with engine(lively) as served:
        want = served.generate(prompts, out=40), served.generate(longer, out=40)
    options = {"layer_groups": 2, "max_relative_error": (2.0, 0.0), "max_token_error": None}
    with engine(lively, pages=400, fusion=options, max_num_batched_tokens=256) as served:
        served.generate(prompts, out=40)
        assert served.statistics["blocks_merged"] and not served.cached_tokens
        served.side._switch_off("on purpose", for_good=True)
        assert (served.generate(prompts, out=40), served.generate(longer, out=40)) == want
        assert served.cached_tokens
        served.assert_drained()
