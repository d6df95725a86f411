"""The workers' tables of vLLM's model runners."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from jointkv.errors import LayoutError
from jointkv.vllm_plugin.engine.runners import RUNNERS, runner_of
from jointkv.vllm_plugin.engine.runners.base import Remap
from jointkv.vllm_plugin.engine.runners.v1 import V1Tables
from jointkv.vllm_plugin.engine.runners.v2 import V2Tables
from tests.vllm_plugin.scheduling import step_of


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
    assert RUNNERS[runner_of(SimpleNamespace(use_v2_model_runner=False))] is V1Tables
    assert RUNNERS[runner_of(SimpleNamespace(use_v2_model_runner=True))] is V2Tables


@pytest.fixture
def second() -> Any:
    """The second model runner with requests `a` and `b` in rows 2 and 0 of two groups."""
    tables = [torch.zeros(4, 8, dtype=torch.int32) for _ in range(2)]
    for number, table in enumerate(tables):
        table[2, :3], table[0, :2] = torch.tensor([1, 2, 3]) + 10 * number, torch.tensor([4, 5]) + 10 * number
    lengths = np.array([[2, 0, 3, 0]] * 2, np.int32)
    return SimpleNamespace(
        req_states=SimpleNamespace(req_id_to_index={"a": 2, "b": 0}),
        block_tables=SimpleNamespace(
            block_tables=[SimpleNamespace(gpu=table) for table in tables], num_blocks=SimpleNamespace(np=lengths)
        ),
        kernel_block_sizes=[32, 16],
        decode_query_len=1,
    )


def test_the_second_runners_tables_are_replaced_on_the_device(second: Any) -> None:
    tables = V2Tables(second)
    tables.replace([remap("a", 1, 8), remap("b", 1, 2), remap("a", 1, 9), remap("a", 0, 7)._replace(group=1)])
    assert tables.read("a", 0, 3) == [[1, 9, 3]] and tables.read("b", 0, 2) == [[4, 2]]
    assert tables.read("a", 1, 3) == [[7, 12, 13]] and tables.read("b", 0, 5) == [[4, 2]]
    assert tables.block_size(0) == 32 and tables.block_size(1) == 16
    with tables.between_steps():
        pass


@pytest.mark.parametrize("one", [remap("gone", 0, 9), remap("a", 3, 9), remap("b", 5, 9)])
def test_what_has_left_the_second_runner_is_passed_over(second: Any, one: Remap) -> None:
    before = second.block_tables.block_tables[0].gpu.clone()
    V2Tables(second).replace([one])
    assert second.block_tables.block_tables[0].gpu.equal(before)


def test_the_rows_of_a_step_are_those_of_the_second_runner(second: Any) -> None:
    """Verifications first, then what has fewest tokens, as its own batch."""
    tables = V2Tables(second)
    new = [
        SimpleNamespace(req_id="a", block_ids=([1, 2], [11, 12])),
        SimpleNamespace(req_id="b", block_ids=([4], [14])),
    ]
    step = step_of(new, {"a": 64, "b": 1})
    step.finished_req_ids, step.scheduled_spec_decode_tokens = set(), {}
    tables.begin(step)
    tables.replace([remap("a", 1, 9)])
    names, rows = tables.batch(0)
    assert names == ["b", "a"] and rows.tolist() == [[4, *[0] * 7], [1, 9, *[0] * 6]]
    step = step_of([], {"a": 1}, [("a", [3], 64)])
    step.finished_req_ids, step.scheduled_spec_decode_tokens = {"b"}, {}
    tables.begin(step)
    names, rows = tables.batch(0)
    assert names == ["a"] and rows[0, :4].tolist() == [1, 9, 3, 0]
    again = step_of([SimpleNamespace(req_id="a", block_ids=([6], [16]))], {"a": 9})
    again.finished_req_ids, again.scheduled_spec_decode_tokens = set(), {}
    tables.begin(again)  # after a preemption
    assert tables.batch(1)[1].tolist() == [[16, *[0] * 7]]
    tables.begin(SimpleNamespace(**{**vars(again), "scheduled_new_reqs": [], "num_scheduled_tokens": {}}))
    assert tables.batch(0)[0] == [] and len(tables.batch(0)[1]) == 0


def test_a_second_runner_that_keeps_its_block_size_for_itself_is_refused(second: Any) -> None:
    del second.kernel_block_sizes
    with pytest.raises(LayoutError, match="V2 does not say what block size"):
        V2Tables(second).block_size(0)
