"""Resetting the prefix cache, aborting and preempting leave nothing stale behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.vllm_plugin.census import Census
from tests.vllm_plugin.engines import LOSSY, Engine, engine, near_prefix

OUT = 24


@pytest.fixture(scope="module")
def shared(calm: Path) -> Iterator[Engine]:
    with engine(calm, fusion=LOSSY) as served, pytest.MonkeyPatch.context() as patch:
        Census(served, patch)
        yield served


@pytest.fixture
def fused(shared: Engine) -> Iterator[Engine]:
    yield shared
    assert shared.statistics["faults"] == 0
    shared.assert_drained()


def merged(served: Engine) -> int:
    return served.statistics["blocks_merged"]


def test_a_reset_empties_the_index(fused: Engine) -> None:
    first, second, third = near_prefix(3, shared=320, seed=1)
    fused.generate([first], OUT)
    before = merged(fused)
    fused.generate([second], OUT)
    assert merged(fused) > before  # pages of finished requests still serve
    assert fused.llm.reset_prefix_cache()
    before = merged(fused)
    fused.generate([third], OUT)
    assert merged(fused) == before


def test_a_reset_while_requests_run(fused: Engine) -> None:
    prompts = near_prefix(4, shared=320, seed=2)
    names = [fused.submit(prompt, OUT) for prompt in prompts]
    before = merged(fused)
    fused.run_until_decoding()
    fused.step()
    gained = merged(fused) - before
    assert gained > 0 and any(tracked.served for tracked in fused.side.requests.active.values())
    assert fused.llm.reset_prefix_cache(reset_running_requests=True)
    assert fused.pages_in_use == 0 and fused.preempted >= 4
    fused.run_until_decoding()
    fused.step()
    assert merged(fused) - before == 2 * gained  # all is computed, looked at and merged again
    fused.finish()
    assert all(len(fused.outputs[name]) == OUT for name in names)


def test_reset_of_the_connector(fused: Engine) -> None:
    fused.generate(near_prefix(2, shared=100, seed=3), 2)
    assert len(fused.side.candidates.residents.index) > 0
    assert fused.connector.reset_cache()
    assert len(fused.side.candidates.residents.index) == 0


def test_aborted_requests_give_back_what_they_share(fused: Engine) -> None:
    names = [fused.submit(prompt, OUT) for prompt in near_prefix(4, shared=320, seed=4)]
    fused.run_until_decoding()
    fused.step()
    # All share the pages of the first one, which goes first.
    first = fused.table(names[0])
    assert len(set(first) & set(fused.table(names[1]))) >= 9
    fused.abort(names[0])
    assert all(fused.pool.blocks[page].ref_cnt == 3 for page in set(first) & set(fused.table(names[1])))
    fused.step()
    fused.abort(names[2])
    fused.finish()
    assert sorted(set(fused.outputs) & set(names)) == sorted([names[1], names[3]])


def test_a_request_that_ends_before_it_begins(fused: Engine) -> None:
    """No block was ever allocated for it, and the connector hears of its end all the same."""
    left_alone = dict(fused.statistics["left_alone"])
    name = fused.submit(near_prefix(1, shared=320, seed=9)[0], OUT)
    fused.abort(name)
    fused.finish()
    assert not fused.side.requests.active and fused.statistics["left_alone"] == left_alone


def test_a_served_block_is_not_fused_again(fused: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[tuple[str, int, int]] = []
    replace = fused.side.tables.replace

    def spy(request_id: str, group: int, slot: int, page: int) -> None:
        replaced.append((request_id, group, slot))
        replace(request_id, group, slot, page)

    monkeypatch.setattr(fused.side.tables, "replace", spy)
    prompts = near_prefix(6, shared=320, seed=5)
    for prompt in prompts:
        fused.submit(prompt, 60)
        fused.step()
    fused.finish()
    assert len(replaced) > 40 and len(set(replaced)) == len(replaced)
