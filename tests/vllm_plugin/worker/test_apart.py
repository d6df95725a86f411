"""Where a device compares, verdicts come with the step after, and nothing else changes. On a CPU it does as if."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.vllm_plugin.messages import Inquiry, Verdict, patience
from jointkv.vllm_plugin.settings import PluginSettings
from jointkv.vllm_plugin.worker.comparer import Comparison, PageComparer
from jointkv.vllm_plugin.worker.side import WorkerSide
from tests.vllm_plugin.engines import EXACT, LOSSY, engine, near_prefix, text

OUT = 24
PROMPTS = [text(150, number // 2) for number in range(12)]
OPTIONS: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 256}
PROBED = {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageComparer, "is_apart", True)


def asked(step: int, pairs: int = 1) -> Inquiry:
    return Inquiry(step, [], *np.ones((3, pairs), np.int64))


@pytest.fixture
def side() -> WorkerSide:
    """A worker's whose device is asked in `begun` and answers in `finished`; step 13 cannot begin, 14 not finish."""
    made: Any = WorkerSide(PluginSettings(enabled=False), SimpleNamespace(), {}, SimpleNamespace(), ())
    made.begun, made.finished = [], []

    def begin(inquiry: Inquiry) -> Comparison:
        if inquiry.step == 13:
            raise RuntimeError("cannot begin")
        made.begun.append(inquiry.step)
        return Comparison(inquiry, [], 0.0)

    def finish(comparison: Comparison) -> Verdict:
        step = comparison.inquiry.step
        if step == 14:
            raise RuntimeError("cannot finish")
        made.finished.append(step)
        return Verdict(step, *np.zeros((5, 1), np.float32))

    made.comparer = SimpleNamespace(is_apart=True, begin=begin, finish=finish)
    return made


def test_the_answer_comes_with_the_next_step_whether_that_asks_or_not(side: Any) -> None:
    assert side.answer(asked(1)) is None and (side.begun, side.finished) == ([1], [])
    assert side.answer(asked(2)).step == 1 and (side.begun, side.finished) == ([1, 2], [1])
    assert side.answer(asked(3, 0)).step == 2 and side.answer(asked(4, 0)) is None
    assert side.begun == side.finished == [1, 2]


def test_a_failure_comes_with_the_next_step_too(side: Any) -> None:
    """So that ranks of which one fails speak of the same step."""
    steps = [side.answer(asked(step)) for step in (12, 13, 14, 15, 16)]
    assert [verdict and verdict.step for verdict in steps] == [None, 12, 13, 14, 15]
    assert [verdict.fault for verdict in steps[1:]] == [
        None,
        "RuntimeError: cannot begin",
        "RuntimeError: cannot finish",
        None,
    ]


def test_on_a_cpu_it_comes_at_once(side: Any) -> None:
    side.comparer.is_apart = False
    assert side.answer(asked(1)).step == 1 and side.answer(asked(2, 0)) is None


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_patience_is_longer_than_any_verdict_takes(batches: int) -> None:
    """Of step n it comes with the output of n + 1, which is there before n + 1 + `batches` is scheduled."""
    assert patience(batches) > batches + 1


@pytest.mark.parametrize("ahead", [False, True], ids=["waits", "a step ahead"])
def test_bound_zero_changes_no_token(ahead: bool, calm: Path, apart: None) -> None:
    with engine(calm, enable_prefix_caching=False, **OPTIONS) as plain:
        expected = plain.generate(PROMPTS, OUT)
    with engine(calm, 28, EXACT, enable_prefix_caching=False, async_scheduling=ahead, **OPTIONS) as served:
        assert served.generate(PROMPTS, OUT) == expected
        assert served.statistics["blocks_merged"] > 0 and served.statistics["faults"] == 0
        assert get_kv_transfer_group().worker.comparer.is_apart
        served.assert_drained()


@pytest.mark.parametrize("ahead", [False, True], ids=["waits", "a step ahead"])
def test_requests_that_wait_for_a_comparison_alone_get_it(ahead: bool, calm: Path, apart: None, bold: None) -> None:
    """Nothing else is computed in the step that brings it."""
    first, second = near_prefix(2, shared=300, head=32)
    with engine(calm, 60, PROBED, async_scheduling=ahead, **OPTIONS) as served:
        served.generate([first], 2)
        (answer,) = served.generate([second], 4)
        assert len(answer) == 4 and served.statistics["prompt_tokens_skipped"] > 0
        assert served.statistics["faults"] == 0
        served.assert_drained()
