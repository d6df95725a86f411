"""Verdicts of several ranks, and what is counted: without an engine."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("vllm")

from jointkv.vllm_plugin.messages import COSINES, ERRORS, Verdict
from jointkv.vllm_plugin.metrics import (
    COUNTERS,
    READERS,
    REPORT_EVERY,
    JointStats,
    Statistics,
    WorkerStatistics,
    readers_of,
)


def verdict(step: int = 1, pairs: int = 3, **more: object) -> Verdict:
    measured = {name: np.asarray(more.pop(name, np.zeros(pairs)), np.float32) for name in (*ERRORS, *COSINES)}
    return Verdict(step, **measured, **more)  # type: ignore[arg-type]


def test_the_worst_rank_counts() -> None:
    first = verdict(key_error=[0.1, 0.2, 0.3], key_cosine=[0.9, 0.7, 1], seconds=1.0)
    second = verdict(key_error=[0.2, 0.1, 0.3], key_cosine=[0.8, 1, 1], token_error=[0, 9, 0], apply_seconds=2.0)
    for joined in (first.aggregate(second), second.aggregate(first)):
        assert np.allclose(joined.key_error, [0.2, 0.2, 0.3])
        assert np.allclose(joined.key_cosine, [0.8, 0.7, 1])
        assert joined.token_error.tolist() == [0, 9, 0]
        assert (joined.step, joined.seconds, joined.apply_seconds, joined.fault) == (1, 1.0, 2.0, None)


def test_signatures_of_ranks_add_up() -> None:
    first, second = (np.array([[0.5, value]], np.float16) for value in (1.0, np.nan))
    joined = verdict(signatures=first, sign_seconds=1.0).aggregate(verdict(signatures=second, sign_seconds=2.0))
    assert joined.signatures.dtype == np.float16 and joined.signatures[0, 0] == 1 and np.isnan(joined.signatures[0, 1])
    assert joined.sign_seconds == 2.0 and joined.fault is None
    assert verdict(signatures=first).aggregate(verdict()).fault is not None


def test_the_fault_of_one_rank_is_the_fault_of_all() -> None:
    given_up = Verdict.given_up(1, "no memory")
    for joined in (verdict().aggregate(given_up), given_up.aggregate(verdict())):
        assert joined.fault == "no memory" and not len(joined.key_error)


@pytest.mark.parametrize("other", [verdict(step=2), verdict(pairs=1)])
def test_answers_to_different_inquiries_are_a_fault(other: Verdict) -> None:
    assert "different inquiries" in str(verdict().aggregate(other).fault)


@pytest.mark.parametrize(
    ("count", "label"),
    [
        (1, "1"),
        (2, "2"),
        (3, "3-4"),
        (4, "3-4"),
        (5, "5-8"),
        (8, "5-8"),
        (9, "9-16"),
        (16, "9-16"),
        (17, "17+"),
        (999, "17+"),
    ],
)
def test_readers_of(count: int, label: str) -> None:
    assert readers_of(count) == label and label in READERS


def test_a_report_holds_what_is_new() -> None:
    statistics = Statistics()
    statistics.add("blocks_considered", 5)
    statistics.merged(0.1)
    statistics.reject("bound")
    assert statistics.leave_alone("short") and not statistics.leave_alone("short")
    first = statistics.take("active", Counter({1: 3, 2: 1, 40: 2})).data
    assert first["counters"] == {"blocks_considered": 5, "blocks_merged": 1, "pages_freed": 1}
    assert (first["rejected"], first["errors"], first["state"]) == ({"bound": 1}, [0.1], "active")
    assert first["left_alone"] == {"short": 2}
    assert first["shared"] == {"1": 3, "2": 1, "3-4": 0, "5-8": 0, "9-16": 0, "17+": 2}
    statistics.merged(0.2)
    second = statistics.take("active", None).data
    assert second["counters"] == {"blocks_merged": 1, "pages_freed": 1} and second["errors"] == [0.2]
    assert not second["rejected"] and not second["left_alone"] and "shared" not in second
    assert statistics.totals()["blocks_merged"] == 2 and set(statistics.totals()) == {
        *COUNTERS,
        "rejected",
        "left_alone",
    }


def test_a_worker_reports_its_attention_now_and_then_and_errors_at_once() -> None:
    worker, counts = WorkerStatistics(), Counter[str]()
    assert worker.take([]) is None and worker.take([counts]) is None
    counts.update(attention_steps=REPORT_EVERY, attention_shared_steps=40)
    first = worker.take([counts])
    assert first is not None
    assert first.data == {"counters": {"attention_steps": REPORT_EVERY, "attention_shared_steps": 40}}
    counts["attention_steps"] += 1
    assert worker.take([counts]) is None
    counts["attention_faults"] += 1
    second = worker.take([counts])
    assert second is not None and second.data == {"counters": {"attention_steps": 1, "attention_faults": 1}}
    assert worker.take([counts]) is None


def test_reports_add_up() -> None:
    total = JointStats({"counters": {"faults": 1}, "errors": [0.1], "state": "active", "shared": {"1": 2}})
    total.aggregate(JointStats({"counters": {"faults": 2, "pages_freed": 1}, "rejected": {"bound": 1}, "state": "off"}))
    assert total.data["counters"] == {"faults": 3, "pages_freed": 1}
    assert total.data["errors"] == [0.1] and total.data["rejected"] == {"bound": 1}
    assert total.data["state"] == "off" and total.data["shared"] == {"1": 2}
    assert total.reduce()["jointkv rejected"] == 1
    total.reset()
    assert total.is_empty()
