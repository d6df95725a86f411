"""The workers' tables of vLLM's first model runner, on its own input batch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from jointkv.vllm_plugin.engine.runners import RUNNERS, runner_of
from jointkv.vllm_plugin.engine.runners.base import Remap
from jointkv.vllm_plugin.engine.runners.v1 import V1Tables


@pytest.fixture
def runner() -> Any:
    """Requests `a` and `b` in rows 0 and 1; `c` is known but not in the batch."""
    rows = np.zeros((4, 8), np.int32)
    rows[0, :3], rows[1, :2] = (1, 2, 3), (4, 5)
    table = SimpleNamespace(block_table=SimpleNamespace(np=rows), block_size=32)
    held = {"a": [1, 2, 3], "b": [4, 5], "c": [6, 7]}
    return SimpleNamespace(
        requests={name: SimpleNamespace(block_ids=(pages,)) for name, pages in held.items()},
        input_batch=SimpleNamespace(req_ids=["a", "b"], req_id_to_index={"a": 0, "b": 1}, block_table=[table]),
    )


def remap(name: str, slot: int, page: int) -> Remap:
    return Remap(name, 0, slot, page, own=0, step=1)


def test_table_and_row_are_replaced(runner: Any) -> None:
    tables = V1Tables(runner)
    tables.replace([remap("a", 1, 9), remap("b", 1, 2)])
    assert tables.read("a", 0, 3) == [[1, 9, 3], [1, 9, 3]] and tables.read("b", 0, 2) == [[4, 2], [4, 2]]
    names, rows = tables.batch(0)
    assert names == ["a", "b"] and rows[:, :3].tolist() == [[1, 9, 3], [4, 2, 0]] and tables.block_size(0) == 32


@pytest.mark.parametrize("one", [remap("gone", 0, 9), remap("a", 3, 9), remap("c", 5, 9)])
def test_what_has_left_the_runner_is_passed_over(runner: Any, one: Remap) -> None:
    before = runner.input_batch.block_table[0].block_table.np.copy()
    V1Tables(runner).replace([one])
    assert np.array_equal(runner.input_batch.block_table[0].block_table.np, before)
    assert [request.block_ids[0] for request in runner.requests.values()] == [[1, 2, 3], [4, 5], [6, 7]]


def test_a_request_that_waits_keeps_its_table(runner: Any) -> None:
    V1Tables(runner).replace([remap("c", 0, 9)])
    assert runner.requests["c"].block_ids[0] == [9, 7]


def test_between_steps_is_vllms_own_guard(runner: Any) -> None:
    runner.synchronize_input_prep = lambda: "the guard"
    guard: Callable[[], Any] = V1Tables(runner).between_steps
    assert guard() == "the guard"


def test_runner_of() -> None:
    assert runner_of(SimpleNamespace(use_v2_model_runner=False)) in RUNNERS
    assert runner_of(SimpleNamespace(use_v2_model_runner=True)) not in RUNNERS
