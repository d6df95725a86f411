"""Faults that end an engine, or keep it from starting, with an error and before anything wrong is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from jointkv.errors import IntegrityError, UnsupportedEngine
from jointkv.vllm_plugin.engine.runners.v1 import V1Tables
from jointkv.vllm_plugin.messages import Inquiry
from tests.vllm_plugin.engines import LOSSY, Engine, engine, near_prefix
from tests.vllm_plugin.faulty import Injected, raising


@pytest.fixture
def fused(calm: Path) -> Iterator[Engine]:
    with engine(calm, fusion=LOSSY) as served:
        for prompt in near_prefix(3, shared=200):
            served.submit(prompt, 8)
        yield served


def computed(fused: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Numbers of tokens of the steps that the model computes from now on."""
    steps: list[int] = []
    execute = fused.runner.execute_model

    def counted(output: Any, *more: Any) -> Any:
        steps.append(output.total_num_scheduled_tokens)
        return execute(output, *more)

    monkeypatch.setattr(fused.runner, "execute_model", counted)
    return steps


@pytest.mark.hazard(
    "Faults",
    "a worker that cannot replace an entry of its block table",
    "the engine ends with the error before it computes anything with a page that is no longer the request's",
)
def test_a_worker_that_cannot_follow(fused: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(V1Tables, "replace", raising)
    steps = computed(fused, monkeypatch)
    with pytest.raises(Injected):
        fused.finish()
    assert steps == []


@pytest.mark.hazard(
    "Faults",
    "a message of the scheduler that is lost, or comes twice",
    "lost: the engine ends with an error before anything is computed; twice: passed over",
)
def test_a_lost_inquiry(fused: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker once went on with pages that the scheduler had handed out to others."""
    inquire = fused.side.next_inquiry
    lost: list[Inquiry] = []

    def lossy(output: Any) -> Inquiry:
        inquiry = inquire(output)
        if inquiry.remaps and not lost:
            lost.append(inquiry)
            steps.clear()
            inquiry = inquire(output)
        return inquiry

    monkeypatch.setattr(fused.side, "next_inquiry", lossy)
    steps = computed(fused, monkeypatch)
    with pytest.raises(IntegrityError, match="is lost, and table entries with it"):
        fused.finish()
    assert lost and steps == []


def test_a_second_engine_in_the_process_is_refused(calm: Path) -> None:
    """vLLM would hand it the first one's connector, and pages of the first would be compared for it."""
    with (
        engine(calm, fusion={}),
        pytest.raises(UnsupportedEngine, match="another engine of this process has jointkv"),
        engine(calm, fusion={}),
    ):
        pass
