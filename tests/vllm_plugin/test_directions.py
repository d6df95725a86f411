"""Directions that blocks of a batch share are written to free pages, read with own norms, and cost no page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.fusion.pairs import pair_statistics
from jointkv.policy import FusionPolicy
from jointkv.vllm_plugin.messages import Inquiry
from tests.hazards import FIRST, runs
from tests.vllm_plugin.engines import EXACT, Engine, engine, in_other_words, text, write_model
from tests.vllm_plugin.test_signatures import FUSED, GROUPS, PAPER, paged, partition

pytestmark = runs("written directions", FIRST)
OUT = 8
SHARED = {"directions": "written", "own_norms": True, "candidates": "signature"}
BOUND = {"similarity": "key", "key_threshold": 0.8, "max_relative_error": 0.3, "max_token_error": None}
SAID = [in_other_words(text(320, 1), seed) for seed in range(4)]
"""The same four times, in other words."""


@pytest.fixture(scope="module")
def synonyms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of eight layers that knows synonyms, in which what was read before changes little."""
    return write_model(tmp_path_factory.mktemp("synonyms"), context=0.1, layers=8, synonyms=0.05)


@contextmanager
def watched(model: Path, pages: int, fusion: dict[str, Any], **options: Any) -> Iterator[tuple[Engine, list[int]]]:
    """An engine, and the pages that were written with directions; none of them is in a table when it is."""
    with engine(model, pages, fusion, **options) as served:
        worker, written = get_kv_transfer_group().worker, []
        apply = worker.apply

        def applied(inquiry: Inquiry) -> None:
            for write in inquiry.directions:
                assert served.pool.blocks[write.page].ref_cnt == 1 and write.page not in write.members
                assert write.page in served.side.tables.held
                for group in served.side.tables.groups:
                    for blocks in group.req_to_blocks.values():
                        assert all(block.block_id != write.page for block in blocks)
                written.append(write.page)
            apply(inquiry)

        worker.apply = applied
        yield served, written


def test_blocks_within_the_bound_read_a_page_that_is_written_for_them(synonyms: Path) -> None:
    with watched(synonyms, 200, {**SHARED, **BOUND}, max_num_batched_tokens=2048) as (served, written):
        names = [served.submit(prompt, OUT) for prompt in SAID]
        served.step()
        before, tables = served.pages_in_use - len(served.side.tables.held), [served.table(name) for name in names]
        kept = paged(get_kv_transfer_group().worker.comparer.groups[0], [page for table in tables for page in table])
        for _ in range(3):
            served.step()
        statistics = served.statistics
        assert written and statistics["directions_written"] == len(written) and statistics["faults"] == 0
        assert statistics["pages_freed"] == before - served.pages_in_use + sum(
            len(served.table(name)) - len(table) for name, table in zip(names, tables, strict=True)
        )
        readers = {page: sum(page in served.table(name) for name in names) for page in written}
        assert statistics["blocks_merged_by_direction"] == sum(readers.values()) >= 2 * len(written)
        assert statistics["pages_freed"] == sum(readers.values()) - len(written) >= 20
        check_errors(served, names, tables, kept, written)
        served.finish()
        served.assert_drained()
        assert not served.side.tables.held


def test_nobody_leaves_a_direction_before_he_ends_and_the_last_reader_frees_it(synonyms: Path) -> None:
    """No page is copied when it is written to: a block is shared when it is full, and then does not change."""
    with watched(synonyms, 200, {**SHARED, **BOUND}, max_num_batched_tokens=2048) as (served, written):
        names = [served.submit(prompt, OUT + 4 * number) for number, prompt in enumerate(SAID)]
        for _ in range(4):
            served.step()
        held = {name: served.table(name)[:10] for name in names}
        assert written and set(written) <= {page for table in held.values() for page in table}
        served.abort(names[2])
        while held:
            held = {name: table for name, table in held.items() if name not in (names[2], *served.outputs)}
            assert all(served.table(name)[: len(table)] == table for name, table in held.items())
            for page in written:
                assert served.pool.blocks[page].ref_cnt == sum(page in table for table in held.values())
            served.step()
        served.assert_drained()


def check_errors(served: Engine, names: list[str], tables: list[list[int]], kept: Any, written: list[int]) -> None:
    """Every reader of a written page is within the bound of what it computed, its own norms included."""
    norms = get_kv_transfer_group().worker.norms
    seen = 0
    for row, name in enumerate(names):
        (known,) = (key for key, _ in norms._rows if key.startswith(name))
        now = served.table(name)
        factors = norms.table(0, [known], torch.tensor([now]))[:, :, 0]
        for slot, page in enumerate(now[: len(tables[row])]):
            if page not in written:
                continue
            read = paged(get_kv_transfer_group().worker.comparer.groups[0], [page])
            for side, layers in enumerate((kept.keys, kept.values)):
                number = row * len(tables[row]) + slot
                own = torch.stack([layer[number].flatten() for layer in layers])
                held = torch.stack([layer[0].flatten() for layer in (read.keys, read.values)[side]])
                apart = own - factors[side, :, slot, None] * held
                error = (apart.square().sum(1) / own.square().sum(1)).mean().sqrt()
                assert float(error) <= BOUND["max_relative_error"] + 1e-5
            seen += 1
    assert seen >= 20


def test_with_a_bound_of_nothing_nothing_is_shared_and_no_page_is_lost(synonyms: Path) -> None:
    with engine(synonyms) as stock:
        expected = stock.generate(SAID, OUT)
    exact = {**SHARED, **BOUND, **EXACT}
    with watched(synonyms, 200, exact, max_num_batched_tokens=2048) as (served, _):
        assert served.generate(SAID, OUT) == expected
        assert served.statistics["blocks_merged"] == 0 == served.statistics["faults"]
        served.assert_drained()
        assert not served.side.tables.held


@pytest.mark.runs("the paper's policy with written directions", *FIRST)
def test_the_papers_plan_is_that_of_the_tree_where_groups_are_not_well_apart(synonyms: Path) -> None:
    """At every threshold: the tree over a batch is the offline one, and alikeness need not be transitive for it."""
    prompts = [in_other_words(text(136, number % 3), number) for number in range(8)]
    for threshold in (0.1, 0.8):
        paper = FusionPolicy.preset("paper", key_threshold=threshold)
        fusion = {**PAPER, **SHARED, "key_threshold": threshold}
        with watched(synonyms, 600, fusion, max_num_batched_tokens=2048) as (served, written):
            names = [served.submit(prompt, 6) for prompt in prompts]
            served.step()
            before = {group: [served.table(name, group)[:4] for name in names] for group in range(GROUPS)}
            groups = get_kv_transfer_group().worker.comparer.groups
            kept = {group: paged(groups[group], torch.tensor(before[group]).T.flatten().tolist()) for group in FUSED}
            in_use, freed = served.pages_in_use - len(served.side.tables.held), 0
            for _ in range(3):
                served.step()
            for group in range(GROUPS):
                now = torch.tensor([served.table(name, group)[:4] for name in names]).T
                if group not in FUSED:
                    assert now.T.tolist() == before[group]
                    continue
                numbers = torch.arange(now.numel()).view_as(now)
                leaders = paper.rule().group(pair_statistics(kept[group], numbers, paper.rule()))
                for slot, row in enumerate(now.tolist()):
                    assert partition(row) == partition(leaders[slot].tolist())
                    freed += len(row) - len(set(row))
            assert freed == served.statistics["pages_freed"] == in_use - served.pages_in_use > 0 and written
            served.finish()
            served.assert_drained()


def test_no_page_is_held_for_requests_that_lose_theirs_between_a_plan_and_its_step(synonyms: Path) -> None:
    with watched(synonyms, 200, {**SHARED, **BOUND}, max_num_batched_tokens=2048) as (served, _):
        for steps in (1, 2):
            names = [served.submit(prompt, OUT) for prompt in SAID]
            for _ in range(steps):
                served.step()
            held = len(served.side.tables.held)
            assert held == (10 if steps == 1 else 0)
            for name in names:
                served.abort(name)
            assert not served.side.tables.held
            assert served.llm.reset_prefix_cache()
        names = [served.submit(prompt, OUT) for prompt in SAID]
        served.step()
        assert served.side.tables.held
        assert served.llm.reset_prefix_cache(reset_running_requests=True)
        assert not served.side.tables.held and served.pages_in_use == 0
        served.finish()
        assert all(len(served.outputs[name]) == OUT for name in names) and served.statistics["faults"] == 0
        served.assert_drained()


def test_requests_that_come_and_go_under_pressure_lose_no_page(synonyms: Path) -> None:
    """Preemption, aborts and prefix hits between a plan and what follows; integrity is checked at every step."""
    fusion = {**SHARED, **BOUND, "candidates": "both"}
    with watched(synonyms, 40, fusion, max_num_batched_tokens=256) as (served, written):
        for seed in range(5):
            said = [in_other_words(text(200 + 32 * (seed % 2), seed // 2), number) for number in range(4)]
            names = [served.submit(prompt, 40) for prompt in said]
            for _ in range(seed + 2):
                served.step()
            served.abort(names[seed % 4])
            for _ in range(4):
                served.step()
            served.abort(names[(seed + 1) % 4])
            served.finish()
            assert not served.side.tables.held
        assert written and served.statistics["faults"] == 0 and served.statistics["blocks_merged_by_direction"] > 0
        assert served.llm.reset_prefix_cache()
        served.assert_drained()
