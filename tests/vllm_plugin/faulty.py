"""An engine in which something goes wrong, and what its requests may expect all the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.vllm_plugin.scheduler import fail_safe
from jointkv.vllm_plugin.scheduler.recovery import Recovery
from tests.vllm_plugin.census import Census
from tests.vllm_plugin.engines import LOSSY, Engine, Prompt, engine, near_prefix

OUT = 20
WAIT = 60.0
AFTER = near_prefix(3, shared=200, seed=2)
"""Requests that come while fusion is off."""


class Injected(Exception):
    """What goes wrong on purpose."""


def raising(*args: Any, **options: Any) -> Any:
    raise Injected("on purpose")


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Patient:
    """A fused engine; three of its requests have merged and still run.

    Attributes:
        expected: what the stock engine answers to AFTER.
        patch: what goes wrong, until `recover`.
        log: lines of the plugin from INFO up: level and text.
    """

    engine: Engine
    census: Census
    expected: list[Prompt]
    patch: pytest.MonkeyPatch
    clock: Clock = field(default_factory=Clock)
    log: list[tuple[int, str]] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)

    @property
    def worker(self) -> Any:
        """The plugin's side at the worker."""
        return get_kv_transfer_group().worker

    @property
    def errors(self) -> list[str]:
        return [text for level, text in self.log if level >= logging.ERROR]

    def new(self, name: str) -> int:
        """What statistics have counted since the requests run."""
        return int(self.engine.statistics[name] - self.before[name])

    def begin(self) -> None:
        """Start as after the start of the engine."""
        assert self.engine.llm.reset_prefix_cache()
        self.engine.connector.scheduler.recovery = Recovery(WAIT, 3, self.clock)
        self.engine.side.enabled = True
        merged = self.engine.statistics["blocks_merged"]
        self.running = [self.engine.submit(prompt, OUT) for prompt in near_prefix(3, shared=200)]
        self.engine.run_until_decoding()
        self.engine.step()
        self.before = self.engine.statistics
        assert self.before["blocks_merged"] > merged

    def serve_on(self, seed: int = 1) -> None:
        """More requests come; they and those that run are answered in full."""
        names = self.running + [self.engine.submit(prompt, OUT) for prompt in near_prefix(3, shared=200, seed=seed)]
        self.engine.finish()
        assert all(len(self.engine.outputs[name]) == OUT for name in names)
        self.running = []

    def assert_unharmed(self) -> None:
        """Nothing was switched off, and what comes next is fused."""
        assert (self.engine.statistics["state"], self.new("faults"), self.errors) == ("active", 0, [])
        merged = self.engine.statistics["blocks_merged"]
        self.engine.generate(near_prefix(3, shared=200, seed=3), OUT)
        assert self.engine.statistics["blocks_merged"] > merged
        self.assert_drained()

    def assert_off(self, cause: str, state: str = "recovering") -> None:
        """It counted once, was logged once, and requests that come now are answered as by the stock engine."""
        self.patch.undo()
        assert (self.engine.statistics["state"], self.new("faults")) == (state, 1)
        merged = self.engine.statistics["blocks_merged"]
        assert self.engine.generate(AFTER, OUT) == self.expected
        assert self.engine.statistics["blocks_merged"] == merged and not len(
            self.engine.side.candidates.residents.index
        )
        assert len(self.errors) == 1 and cause in self.errors[0] and "has switched itself off" in self.errors[0]

    def assert_comes_back(self) -> None:
        """After the wait, with the next requests."""
        self.clock.now += WAIT
        merged = self.engine.statistics["blocks_merged"]
        self.engine.generate(near_prefix(3, shared=200, seed=3), OUT)
        assert self.engine.statistics["blocks_merged"] > merged
        assert (self.engine.statistics["state"], self.new("faults")) == ("active", 1)
        assert self.log[-1] == (logging.INFO, "jointkv is on again, for requests that arrive from now on")
        self.assert_drained()

    def assert_stays_off(self) -> None:
        self.clock.now += 1e9
        merged = self.engine.statistics["blocks_merged"]
        self.engine.generate(near_prefix(3, shared=200, seed=3), OUT)
        assert (self.engine.statistics["state"], self.engine.statistics["blocks_merged"]) == ("disabled", merged)
        self.assert_drained()

    def assert_drained(self) -> None:
        self.engine.assert_drained()
        assert not self.engine.side.requests.left_alone and not self.engine.side.questions.asked
        assert not self.engine.pool.cached_block_hashes_by_block  # what private hashes leave behind


@pytest.fixture(scope="module")
def ward(calm: Path) -> Iterator[tuple[Engine, Census, list[Prompt]]]:
    """One engine for all; it recovers between the tests, as it shall."""
    with engine(calm) as stock:
        expected = stock.generate(AFTER, OUT)
    with engine(calm, fusion=LOSSY) as fused, pytest.MonkeyPatch.context() as patch:
        yield fused, Census(fused, patch), expected


@pytest.fixture
def patient(
    ward: tuple[Engine, Census, list[Prompt]], monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> Iterator[Patient]:
    """See `Patient`."""
    fused, census, expected = ward
    found = Patient(fused, census, expected, monkeypatch)
    handler, level = logging.Handler(logging.INFO), fail_safe.logger.level
    handler.emit = lambda record: found.log.append((record.levelno, record.getMessage()))  # type: ignore[method-assign]
    fail_safe.logger.addHandler(handler)
    fail_safe.logger.setLevel(logging.INFO)
    finished = len(fused.outputs)
    try:
        found.begin()
        yield found
        record_property("requests", len(fused.outputs) - finished)
    finally:
        fail_safe.logger.removeHandler(handler)
        fail_safe.logger.setLevel(level)
        monkeypatch.undo()
        for name in list(fused.vllm_scheduler.requests):
            fused.llm.llm_engine.engine_core.abort_requests([name])
        for _ in range(OUT):  # what a failed test leaves may never end
            if fused.llm.llm_engine.has_unfinished_requests():
                fused.step()
