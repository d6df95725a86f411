"""Off is the stock engine; bound 0 changes no token; near-prefix traffic gives most of its pages back."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.hazards import FIRST
from tests.vllm_plugin.engines import EXACT, Engine, Prompt, engine, near_prefix, text

OUT = 24
DUPLICATES = [text(300, number // 4) for number in range(16)]
NEAR = near_prefix(8, shared=640)


def serve(served: Engine, prompts: list[Prompt]) -> tuple[list[Prompt], int, int]:
    """Outputs, pages in use after prefill, steps."""
    names = [served.submit(prompt, OUT) for prompt in prompts]
    served.run_until_decoding()
    pages = served.pages_in_use
    served.finish()
    return [served.outputs[name] for name in names], pages, served.steps


@pytest.fixture(scope="module")
def stock(calm: Path) -> dict[str, tuple[list[Prompt], int, int]]:
    """What the stock engine says, with the prefix cache on and off."""
    served = {}
    for caching in (True, False):
        for name, prompts in (("duplicates", DUPLICATES), ("near", NEAR)):
            with engine(calm, enable_prefix_caching=caching) as plain:
                served[f"{name} {caching}"] = serve(plain, prompts)
                plain.assert_drained()
    return served


def assert_consistent(statistics: dict) -> None:
    assert statistics["faults"] == 0
    assert statistics["blocks_merged"] == statistics["pages_freed"]
    rejected = sum(statistics["rejected"].values())
    assert statistics["blocks_considered"] >= statistics["blocks_merged"] + rejected


def test_off_is_the_stock_engine(calm: Path, stock: dict) -> None:
    with engine(calm, fusion={"enabled": False}) as off:
        assert serve(off, NEAR) == stock["near True"]
        assert off.statistics["state"] == "off" and off.statistics["blocks_considered"] == 0
        off.assert_drained()


@pytest.mark.runs("fusion", *FIRST)
def test_bound_zero_frees_exact_duplicates_and_changes_no_token(calm: Path, stock: dict) -> None:
    outputs, pages, steps = stock["duplicates False"]
    with engine(calm, fusion=EXACT, enable_prefix_caching=False) as fused:
        found, found_pages, found_steps = serve(fused, DUPLICATES)
        assert (found, found_steps) == (outputs, steps)
        assert pages == 16 * 10
        # Of each text nine full blocks once, and everybody's last block; more where a processor rounds the same text
        # otherwise in another batch, which bound 0 must not merge.
        assert 4 * 9 + 16 <= found_pages <= pages // 2
        assert_consistent(fused.statistics)
        # Later blocks of equal outputs are duplicates as well.
        assert fused.statistics["blocks_merged"] == 3 * 4 * (324 // 32)
        fused.assert_drained()


@pytest.mark.runs("fusion", *FIRST)
def test_near_prefix_traffic_gives_most_pages_back(calm: Path, stock: dict) -> None:
    _, pages, _ = stock["near True"]
    with engine(calm, fusion={}) as fused:
        names = [fused.submit(prompt, OUT) for prompt in NEAR]
        fused.run_until_decoding()
        assert fused.pages_in_use <= 0.4 * pages
        served = [set(fused.table(name)) for name in names]
        assert len(set.union(*served)) == fused.pages_in_use
        fused.finish()
        assert all(len(fused.outputs[name]) == OUT for name in names)
        assert fused.statistics["state"] == "active"
        assert_consistent(fused.statistics)
        fused.assert_drained()


def test_a_bound_that_nothing_meets(lively: Path) -> None:
    with engine(lively, fusion={"max_relative_error": 1e-4}) as fused:
        serve(fused, NEAR)
        statistics = fused.statistics
        assert statistics["blocks_merged"] == 0 and statistics["state"] == "active"
        assert statistics["rejected"]["bound"] > 50 and set(statistics["rejected"]) == {"bound"}
        assert_consistent(statistics)


def test_a_pool_that_is_empty_enough_is_left_alone(calm: Path) -> None:
    with engine(calm, pages=400, fusion={"min_pool_usage": 0.3}) as fused:
        serve(fused, NEAR[:4])  # 96 of 399 pages
        assert fused.statistics["blocks_considered"] == 0 and fused.statistics["state"] == "inert"
        serve(fused, near_prefix(8, shared=640, seed=1))
        assert fused.statistics["blocks_merged"] > 0 and fused.statistics["state"] == "active"
        assert_consistent(fused.statistics)
        fused.assert_drained()
        assert sum(block.ref_cnt for block in fused.pool.blocks[1:]) == 0


@pytest.mark.runs("chunks of one request", *FIRST)
@pytest.mark.parametrize("scope", ["chunk", "both"])
def test_chunks_of_one_request_share_pages(calm: Path, scope: str) -> None:
    repeated = [text(96, number) * 4 + text(8, number) for number in range(3)]
    options = {"scope": scope, "chunk_tokens": 96, "max_relative_error": 1.5, "max_token_error": None}
    with engine(calm, fusion=options, max_num_batched_tokens=128) as fused:
        names = [fused.submit(prompt, OUT) for prompt in repeated]
        fused.run_until_decoding()
        tables = [fused.table(name) for name in names]
        assert any(len(set(table)) < len(table) for table in tables)
        fused.finish()
        assert fused.statistics["blocks_merged"] > 0
        assert_consistent(fused.statistics)
        fused.assert_drained()
