"""What a step says of the requests in it: who starts or comes back, and which pages those that go on will write."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from jointkv.vllm_plugin.engine.steps import pages_to_write, resumed
from tests.vllm_plugin.scheduling import BLOCK, step_of


@pytest.mark.parametrize(
    ("output", "written"),
    [
        (step_of(), []),
        (step_of(running=[("a", None, 70), ("b", [9], 64)]), [9]),
        (step_of(running=[("a", [7, 8, 9], BLOCK)], resumed=["a"]), []),
        (step_of(running=[("a", [7], 3 * BLOCK)]), [7]),
    ],
)
def test_pages_to_write(output: Any, written: list[int]) -> None:
    assert list(pages_to_write(output)) == written


def test_pages_that_are_to_be_zeroed_are_written() -> None:
    output = step_of(running=[("a", [7], 64)])
    output.new_block_ids_to_zero = [11, 12]
    assert list(pages_to_write(output)) == [7, 11, 12]


def test_resumed() -> None:
    output = step_of(running=[("a", [7, 8], 40), ("b", None, 80)], resumed=["a"])
    assert list(resumed(output)) == [("a", 40)] and not list(resumed(step_of(running=[("b", None, 80)])))
