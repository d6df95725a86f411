"""Blocks of other text are found by what they hold, within bounds or as the paper has it, and pages are really free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.core.blocks import PagedKV
from jointkv.core.packed import PackedPages
from jointkv.fusion.pairs import pair_statistics
from jointkv.fusion.tree import plan_matrix
from jointkv.policy import FusionPolicy
from jointkv.vllm_plugin.scheduler import searching
from tests.hazards import FIRST, FIRST_AHEAD, runs
from tests.vllm_plugin.engines import Engine, Prompt, engine, in_other_words, near_prefix, text, write_model

OUT = 8
BOUND = {"max_relative_error": 0.3, "max_token_error": 0.6}
SAID = [in_other_words(text(320, 1), seed) for seed in range(4)]
"""The same four times, in other words."""


@pytest.fixture(scope="module")
def synonyms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of eight layers that knows synonyms, in which what was read before changes little."""
    return write_model(tmp_path_factory.mktemp("synonyms"), context=0.1, layers=8, synonyms=0.05)


def paged(pages: PackedPages, numbers: list[int]) -> PagedKV:
    """A copy of K and V of some pages, as they are now, tokens in order."""
    keys, values = pages.vectors(torch.tensor(numbers))
    return PagedKV(*([side.unflatten(1, (pages.block_size, 1, -1)) for side in sides] for sides in (keys, values)))


def watch_errors(served: Engine, patch: pytest.MonkeyPatch) -> list[float]:
    """Fills with the relative error of every block that is replaced, the larger one of K and V, at that moment."""
    errors, replace = [], served.side.tables.replace

    def watched(request_id: str, group: int, slot: int, page: int) -> None:
        pages = get_kv_transfer_group().worker.comparer.groups[group]
        kv = paged(pages, [served.side.tables.block(request_id, group, slot).block_id, page])
        for layers in (kv.keys, kv.values):
            own, read = torch.stack(list(layers)).flatten(2).double().unbind(1)
            errors.append(float(((own - read).square().sum(1) / own.square().sum(1)).mean().sqrt()))
        replace(request_id, group, slot, page)

    patch.setattr(served.side.tables, "replace", watched)
    return errors


def pages_after_prefill(served: Engine, prompts: list[Prompt], out: int = OUT) -> int:
    """Once every prompt is read and compared; the answers are written to their end."""
    for prompt in prompts:
        served.submit(prompt, out)
    served.run_until_decoding()
    for _ in range(4):
        served.step()
    pages = served.pages_in_use
    served.finish()
    return pages


@pytest.mark.parametrize(
    "ahead",
    [
        pytest.param(False, id="waits", marks=runs("blocks of other text", FIRST)),
        pytest.param(True, id="a step ahead", marks=[*runs("blocks of other text", FIRST_AHEAD), pytest.mark.slow]),
    ],
)
def test_what_is_said_in_other_words_is_found_and_stays_within_the_bound(
    ahead: bool, synonyms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"async_scheduling": ahead, "max_num_batched_tokens": 640}
    with engine(synonyms, fusion={**BOUND, "candidates": "both"}, **options) as served:
        errors = watch_errors(served, monkeypatch)
        pages = pages_after_prefill(served, SAID)
        assert pages <= 10 + 4 + 3  # of 44; a block or two may be beyond the bound
        assert len(errors) and 0 < max(errors) <= BOUND["max_relative_error"]
        statistics = served.statistics
        assert statistics["blocks_merged"] == statistics["blocks_merged_by_signature"] == statistics["pages_freed"]
        assert statistics["faults"] == 0 and statistics["blocks_signed"] > 0 < statistics["blocks_searched"]
        served.assert_drained()


def test_both_finds_what_tokens_find_and_signs_nothing_of_it(calm: Path) -> None:
    prompts = near_prefix(4, shared=320)
    found = {}
    for candidates in ("tokens", "both"):
        with engine(calm, fusion={"candidates": candidates}) as served:
            pages_after_prefill(served, prompts)
            found[candidates] = served.statistics
            served.assert_drained()
    merged = {name: statistics["blocks_merged"] for name, statistics in found.items()}
    assert merged["both"] >= merged["tokens"] > 20
    # Blocks of equal text are merged without a signature of theirs: one of four texts is signed, and what stands alone.
    assert found["both"]["blocks_merged_by_signature"] <= merged["both"] - merged["tokens"]
    assert found["both"]["blocks_signed"] <= found["both"]["blocks_considered"] - merged["tokens"]
    assert found["tokens"]["blocks_signed"] == 0 == found["tokens"]["blocks_searched"]


def test_of_text_in_which_nothing_is_found_few_blocks_are_signed(calm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "QUIET", 32)
    with engine(calm, fusion={"candidates": "both"}) as served:
        served.generate([text(320, number) for number in range(12)], OUT)
        statistics = served.statistics
        assert statistics["blocks_considered"] == 120 and statistics["blocks_merged"] == 0
        assert 32 <= statistics["blocks_searched"] <= statistics["blocks_signed"] < 50
        served.assert_drained()


def test_signatures_leave_with_their_pages_and_none_are_taken_of_a_pool_that_is_empty_enough(synonyms: Path) -> None:
    """A full pool hands every page out again and again; integrity is checked at every step."""
    with engine(synonyms, pages=40, fusion={**BOUND, "candidates": "signature", "min_pool_usage": 0.5}) as served:
        served.generate(SAID[:1], OUT)
        statistics = served.statistics
        assert statistics["blocks_signed"] == statistics["blocks_searched"] == 0 == statistics["sign_seconds"]
        assert statistics["state"] == "inert"
        for seed in range(4):
            served.generate([in_other_words(text(300, seed), number) for number in range(3)], OUT)
        assert 0 < len(served.side.candidates.residents.signatures) <= 39
        assert served.statistics["blocks_merged"] > 0 and served.statistics["state"] == "active"
        assert served.llm.reset_prefix_cache()
        served.generate([text(40, 9)], 1)
        assert not len(served.side.candidates.residents.signatures)
        served.assert_drained()


def test_chunks_of_one_request_that_say_the_same_in_other_words(synonyms: Path) -> None:
    said = text(96, 3)
    prompt = [token for seed in range(4) for token in in_other_words(said, seed)]
    options = {"scope": "chunk", "chunk_tokens": 96, "max_relative_error": 1.3, "max_token_error": None}
    with engine(synonyms, fusion={**options, "candidates": "signature"}, max_num_batched_tokens=96) as served:
        name = served.submit(prompt, OUT)
        served.run_until_decoding()
        for _ in range(3):
            served.step()
        table = served.table(name)
        assert len(table) == 13 > len(set(table)) == served.pages_in_use
        served.finish()
        served.assert_drained()


# The paper's policy.

GROUPS, FUSED = 4, (1, 2)
PAPER = {"policy": "paper", "accept_unbounded": True, "layer_groups": GROUPS, "key_threshold": 0.8}


def partition(leaders: list[int]) -> list[int]:
    """Groups by the first of each, whatever their names."""
    return [leaders.index(leader) for leader in leaders]


@pytest.mark.runs("the paper's policy", *FIRST)
def test_the_plan_of_a_batch_that_fills_together_is_that_of_the_tree(synonyms: Path) -> None:
    """Blocks that become full in one step are grouped as offline, where groups are well apart.

    Where alikeness is not transitive the two may differ: the tree merges halves, the engine takes blocks as they come.
    """
    prompts = [in_other_words(text(136, number % 3), number) for number in range(8)]
    policy = FusionPolicy(
        similarity="key", key_threshold=0.8, max_relative_error=None, max_token_error=None, max_candidates=8
    )
    paper = FusionPolicy.preset("paper", key_threshold=0.8)
    with engine(synonyms, 600, PAPER, max_num_batched_tokens=2048) as served:
        names = [served.submit(prompt, 6) for prompt in prompts]
        served.step()
        pages = {group: torch.tensor([served.table(name, group)[:4] for name in names]).T for group in range(GROUPS)}
        groups = get_kv_transfer_group().worker.comparer.groups
        assert set(groups) == set(FUSED)
        kept = {group: paged(groups[group], pages[group].flatten().tolist()) for group in FUSED}
        in_use = served.pages_in_use
        for _ in range(3):
            served.step()
        freed = 0
        for group in range(GROUPS):
            tables = torch.tensor([served.table(name, group)[:4] for name in names]).T
            if group not in FUSED:
                assert torch.equal(tables, pages[group])
                continue
            numbers = torch.arange(tables.numel()).view_as(tables)
            plan = plan_matrix(kept[group], numbers, numbers % 8, numbers // 8, policy)
            leaders = paper.rule().group(pair_statistics(kept[group], numbers, paper.rule()))
            planned = numbers.flatten().clone()
            planned[plan.old_page] = plan.page
            for slot, row in enumerate(tables.tolist()):
                assert partition(row) == partition(planned.view_as(tables)[slot].tolist())
                assert partition(row) == partition(leaders[slot].tolist())
                assert len(set(row)) == 3
            freed += len(plan)
        assert served.pages_in_use == in_use - freed and freed == 2 * 4 * 5
        assert served.statistics["pages_freed"] == freed
        served.finish()
        served.assert_drained()
