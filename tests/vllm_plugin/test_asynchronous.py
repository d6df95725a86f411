"""vLLM's first model runner with a scheduler that is a step ahead, as on a GPU, kept past the CPU platform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer import get_kv_transfer_group

from tests.hazards import FIRST_AHEAD, runs
from tests.vllm_plugin.engines import EXACT, Engine, Prompt, engine, near_prefix, text
from tests.vllm_plugin.test_directions import BOUND, SHARED, watched

OUT = 40
PROMPTS = [text(150, number // 2) for number in range(16)]
ALIKE = near_prefix(6, shared=300)
OPTIONS: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 256, "enable_prefix_caching": False}


def crowd(served: Engine) -> dict[str, Prompt]:
    """Answers by name; some who wait, read and decode go away."""
    names = [served.submit(prompt, OUT) for prompt in PROMPTS]
    for step in range(20):
        served.step()
        if step in (2, 9, 15):
            served.abort(names[step])
    served.finish()
    return {name: served.outputs[name] for name in names if name not in (names[2], names[9], names[15])}


@pytest.fixture(scope="module")
def stock(calm: Path) -> dict[str, Prompt]:
    with engine(calm, **OPTIONS) as served:
        return crowd(served)


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param(1, marks=runs("fusion", FIRST_AHEAD)),
        pytest.param(2, marks=runs("layer groups", FIRST_AHEAD)),
    ],
)
def test_bound_zero_changes_no_token_though_requests_are_preempted_and_aborted(
    groups: int, calm: Path, stock: dict[str, Prompt]
) -> None:
    with engine(calm, 30 * groups, {**EXACT, "layer_groups": groups}, async_scheduling=True, **OPTIONS) as served:
        assert served.core.batch_queue_size == 2
        assert crowd(served) == stock
        assert served.statistics["blocks_merged"] > 0 and served.statistics["faults"] == 0
        assert served.preempted > 0
        served.assert_drained()


@pytest.mark.runs("own norms", *FIRST_AHEAD)
def test_blocks_keep_their_norms(calm: Path) -> None:
    """Norms that are another page's end the engine."""
    fusion = {"max_relative_error": 0.5, "max_token_error": None, "own_norms": True}
    with engine(calm, 28, fusion, async_scheduling=True, **OPTIONS) as served:
        names = [served.submit(prompt, OUT) for prompt in ALIKE]
        for _ in range(30):
            served.step()
        assert len(get_kv_transfer_group().worker.norms) > 0
        served.llm.reset_prefix_cache(reset_running_requests=True)
        served.finish()
        assert all(len(served.outputs[name]) == OUT for name in names)
        assert served.statistics["blocks_merged"] > 0 and served.statistics["faults"] == 0
        assert served.preempted > 0
        served.assert_drained()


@pytest.mark.runs("written directions", *FIRST_AHEAD)
def test_directions_are_written_and_pages_held_for_them_do_not_keep_the_cache_from_being_emptied(calm: Path) -> None:
    options = {"max_model_len": 512, "max_num_batched_tokens": 4096, "async_scheduling": True}
    with watched(calm, 76, {**SHARED, **BOUND}, **options) as (served, written):
        names = [served.submit(prompt, OUT) for prompt in ALIKE]
        for _ in range(4):
            if not served.side.tables.held:
                served.step()
        assert served.side.tables.held and served.core.batch_queue_size == 2
        assert served.llm.reset_prefix_cache(reset_running_requests=True)
        assert not served.side.tables.held and served.pages_in_use == 0
        served.finish()
        assert all(len(served.outputs[name]) == OUT for name in names) and served.preempted >= len(names)
        merged = served.statistics["blocks_merged_by_direction"]
        assert written and merged == served.statistics["pages_freed"] + len(set(written)) > 0
        assert served.statistics["faults"] == 0
        served.assert_drained()
        assert not served.side.tables.held
