"""An error in any hook of reuse switches it off for a while, is counted once, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("vllm")

from jointkv.vllm_plugin.scheduler import entry_blocks, helpers, reuse
from jointkv.vllm_plugin.scheduler.recovery import Recovery
from tests.vllm_plugin.engines import LOSSY, Engine, engine, near_prefix
from tests.vllm_plugin.faulty import WAIT, Clock, raising

OUT = 6
WITHOUT_LICENCE = ("licences.granted", "licences.observe", "fusion.audits.note", "fusion.conclude")
HOOKS = (
    "reuse.prepare",
    "reuse.holds",
    "reuse.begin",
    "reuse.entry_blocks.questions",
    "reuse.dismiss",
    "reuse.ended",
    "reuse.stray",
    "reuse.sent.forget_ended",
    "reuse.followers.new_step",
    "reuse.followers.follows",
    "reuse.look_up.intake",
    "reuse.entry_blocks._advance",
    "reuse.entry_blocks._hear",
    "reuse._start",
    "sharing.adopt",
    "sharing.started",
    "tables.found",
    "tables.lead_to",
    "candidates.residents.find",
    "candidates.residents.known",
    "candidates.residents.unchanged",
    "candidates.residents.testify",
    "questions.ask",
    "questions.settle",
    *WITHOUT_LICENCE,
)


@pytest.fixture(scope="module")
def reusing(calm: Path, bold: None) -> Iterator[Engine]:
    with engine(calm, fusion={**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}) as served:
        yield served


class Ward:
    """An engine that reuses, as after its start, with a donor that has finished."""

    def __init__(self, served: Engine) -> None:
        self.served, self.clock = served, Clock()
        assert served.llm.reset_prefix_cache()
        served.side.recovery = Recovery(WAIT, 3, self.clock)
        served.side.enabled = True
        served.generate(near_prefix(1, shared=300), 2)
        self.before = served.statistics

    def new(self, name: str) -> int:
        return int(self.served.statistics[name] - self.before[name])

    def serve(self) -> None:
        """Requests that could reuse are answered in full, one of them is aborted on its way."""
        names = [self.served.submit(prompt, OUT) for prompt in near_prefix(4, shared=300)[1:]]
        self.served.step()
        self.served.abort(names.pop())
        for _ in range(200):
            if not self.served.llm.llm_engine.has_unfinished_requests():
                break
            self.served.step()
        assert all(len(self.served.outputs[name]) == OUT for name in names)

    def assert_comes_back(self) -> None:
        """It was counted once; nothing is left behind; after the wait prompts are skipped again."""
        assert (self.new("faults"), self.served.statistics["state"]) == (1, "recovering")
        skipped = self.new("prompt_tokens_skipped")
        self.served.generate(near_prefix(3, shared=300, seed=2), 2)
        assert self.new("prompt_tokens_skipped") == skipped
        self.assert_drained()
        self.clock.now += WAIT
        self.served.generate(near_prefix(1, shared=300, seed=3), 2)
        self.served.generate(near_prefix(3, shared=300, seed=3)[1:], 2)
        assert self.new("prompt_tokens_skipped") > skipped and self.new("faults") == 1
        self.assert_drained()

    def assert_drained(self) -> None:
        self.served.assert_drained()
        assert not self.served.side.reuse.intakes and not self.served.side.reuse.stray()
        assert not self.served.side.requests.left_alone and not self.served.side.questions.asked
        assert not self.served.pool.cached_block_hashes_by_block


ERROR = pytest.mark.hazard(
    "Faults",
    "an error in any hook of reuse",
    "all requests are answered in full; reuse is off at once and back after the wait; no helper is left",
)


@ERROR
@pytest.mark.parametrize("hook", HOOKS)
def test_in_a_hook(hook: str, reusing: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ward = Ward(reusing)
    if hook in WITHOUT_LICENCE:
        monkeypatch.setattr(reusing.side.licences, "_needed", True)
    *owners, name = hook.split(".")
    monkeypatch.setattr(reduce(getattr, owners, reusing.side), name, raising)
    ward.serve()
    monkeypatch.undo()
    if hook in ("reuse.dismiss", "reuse.ended"):  # what these have kept from being done for requests that are gone
        for tracked in reusing.side.requests.left_alone.values():
            reusing.side.sharing.forget(tracked)
        reusing.side.requests.left_alone.clear()
    ward.assert_comes_back()


@ERROR
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (helpers, "helper_of"),
        *((reuse, name) for name in ("send_ahead", "in_line", "seats")),
        (entry_blocks, "Question"),
    ],
)
def test_when_helpers_are_made(module: ModuleType, name: str, reusing: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ward = Ward(reusing)
    monkeypatch.setattr(module, name, raising)
    ward.serve()
    monkeypatch.undo()
    ward.assert_comes_back()


@ERROR
@pytest.mark.parametrize("number", [1, 2])
def test_when_vllm_takes_no_helper(number: int, reusing: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are in line already."""
    ward = Ward(reusing)
    add, taken = reusing.vllm_scheduler.add_request, []

    def failing(request: object) -> None:
        if "-gap-" in request.request_id:  # type: ignore[attr-defined]
            taken.append(request)
            if len(taken) == number:
                raising()
        add(request)

    monkeypatch.setattr(reusing.vllm_scheduler, "add_request", failing)
    ward.serve()
    monkeypatch.undo()
    assert len(taken) == number
    ward.assert_comes_back()
