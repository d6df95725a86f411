"""An error anywhere in the plugin ends fusion, is counted and logged once, and harms no request."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from census import Census
from engines import LOSSY, Engine, engine, near_prefix
from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.vllm_plugin import connector

OUT = 24
HOOKS = (
    "ask",
    "settle",
    "admit",
    "dismiss",
    "tables.replace",
    "tables.may_replace",
    "index.prefer",
    "index.candidates",
)


class Injected(Exception):
    pass


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the plugin logs as errors."""
    kept: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: kept.append(record.getMessage())  # type: ignore[method-assign]
    connector.logger.addHandler(handler)
    yield kept
    connector.logger.removeHandler(handler)


@pytest.fixture
def fused(calm: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine that has merged blocks of requests that still run."""
    with engine(calm, fusion=LOSSY) as served:
        served.census = Census(served, monkeypatch)  # type: ignore[attr-defined]
        for prompt in near_prefix(4, shared=200):
            served.submit(prompt, OUT)
        served.run_until_decoding()
        assert served.statistics["blocks_merged"] > 0
        yield served


def raising(*args: Any, **options: Any) -> Any:
    raise Injected("on purpose")


def serve_on(fused: Engine, lines: list[str]) -> None:
    """More requests come and all are answered in full, without fusion."""
    names = [fused.submit(prompt, OUT) for prompt in near_prefix(4, shared=200, seed=1)]
    fused.finish()
    merged = fused.statistics["blocks_merged"]
    names += [fused.submit(prompt, OUT) for prompt in near_prefix(2, shared=200, seed=2)]
    fused.finish()
    assert len(fused.outputs) == 10 and all(len(tokens) == OUT for tokens in fused.outputs.values())
    assert set(names) <= set(fused.outputs)
    assert fused.statistics["state"] == "disabled" and fused.statistics["faults"] >= 1
    assert fused.statistics["blocks_merged"] == merged
    assert len(lines) == 1 and "on purpose" in lines[0]
    assert not len(fused.fusion.index)
    fused.assert_drained()


@pytest.mark.parametrize("hook", HOOKS)
def test_in_the_scheduler(fused: Engine, lines: list[str], monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    owner, _, name = hook.rpartition(".")
    monkeypatch.setattr(getattr(fused.fusion, owner) if owner else fused.fusion, name, raising)
    serve_on(fused, lines)


def test_in_the_worker(fused: Engine, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_kv_transfer_group()._comparer, "answer", raising)
    serve_on(fused, lines)


def test_after_a_commit(fused: Engine, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has changed when the error comes: the workers must follow it."""
    replace = fused.fusion.tables.replace

    def late(*args: Any) -> None:
        replace(*args)
        raise Injected("on purpose")

    monkeypatch.setattr(fused.fusion.tables, "replace", late)
    names = [fused.submit(prompt, OUT) for prompt in near_prefix(4, shared=200, seed=1)]
    fused.finish()
    assert all(len(fused.outputs[name]) == OUT for name in names)
    assert fused.statistics["state"] == "disabled" and len(lines) == 1
    fused.assert_drained()
