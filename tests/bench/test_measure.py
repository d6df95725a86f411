"""From what client and server saw to the numbers of a run."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jointkv.bench import measure as measuring
from jointkv.bench import server as serving
from jointkv.bench.load_generator import LoadFailed
from jointkv.bench.load_process import Answer, LoadOutcome, Spec
from jointkv.bench.measure import measure
from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Arm, Load, Run, Timeline
from jointkv.bench.server import Server, ServerFailed, Step, free_port, get
from tests.bench.plans import arm, plan
from tests.bench.test_server import STUB, pids

REQUESTS = (ServingRequest((1, 2, 3, 4), 3), ServingRequest((5, 6), 3))
CLOSED = Load(kind="closed", concurrency=1)
FIRST, STOCK = arm("first"), arm(pool_blocks=11)


def answer(start: float = 0.0, prompt: int = 100, tokens: int = 11, error: str | None = None) -> Answer:
    """First token after 1 s, one every 0.1 s since."""
    itls = [0.1] * (tokens - 1)
    return Answer(
        **{"start": start, "prompt_tokens": prompt, "output_tokens": tokens, "ttft": 1.0, "e2el": 1.0 + sum(itls)},
        **{"itl": 0.1 if itls else None, "itls": itls, "text": "text", "error": error},
    )


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    monkeypatch.setattr(serving, "GRACE_SECONDS", 0.5)
    mode = getattr(request, "param", "serve")
    with Server([sys.executable, str(STUB), mode], os.environ, free_port(), tmp_path / "log") as started:
        started.start(30.0)
        yield started


def send(spec: Spec, progress: Any, during: Any, cores: Any) -> LoadOutcome:
    """In place of the load generator: really sends, and makes the times up."""
    assert (spec.model, spec.tokenizer, spec.seed) == ("m", "folder", 6)
    with during:
        for number, (prompt, tokens, _) in enumerate(spec.requests):
            get(f"{spec.url}/v1/completions", body={"prompt": prompt, "max_tokens": tokens, "stream": True})
            progress(number + 1)
    return outcome([answer(prompt=len(prompt), tokens=tokens) for prompt, tokens, _ in spec.requests])


def outcome(answers: list[Answer]) -> LoadOutcome:
    rates = {"output_tokens_per_s": 3.0, "total_tokens_per_s": 6.0, "requests_per_s": 1.0}
    return LoadOutcome(began=0.0, seconds=2.0, answers=answers, cpu_seconds=0.0, **rates)


def run_of(server: Server, arm: Arm = STOCK, progress: Any = lambda done: None) -> tuple[Run, list[str]]:
    made = replace(plan(loads=(CLOSED,)), arms=(FIRST, arm), block_bytes={arm.name: 1000}, requests=REQUESTS)
    return measure(made, server, arm, CLOSED, 2, progress)


def test_a_run_on_a_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM")
    monkeypatch.setattr(measuring, "drive", send)
    run_of(server)  # counters start at what was there before
    done: list[int] = []
    run, texts = run_of(server, progress=done.append)
    assert (done, texts) == ([1, 2], ["text", "text"])
    assert (run.arm, run.load, run.round, run.position) == ("stock", "closed 1", 2, 2)
    assert (run.completed, run.failed, run.prompt_tokens, run.output_tokens) == (2, 0, 6, 6)
    assert (run.seconds, run.output_tokens_per_s, run.total_tokens_per_s, run.requests_per_s) == (2.0, 3.0, 6.0, 1.0)
    assert (run.prompt_tokens_computed, run.recomputed_tokens) == (20, 14)
    assert (run.reuse, run.skipped_share, run.warmup) == (None, None, None)
    assert run.preemptions == 2 and run.running_peak == 1
    assert run.pool_usage_peak == run.pool_usage_mean == 0.25
    assert (run.fusion, run.plugin_seconds, run.pages_freed) == (None, None, None)
    assert run.server_cpu_seconds is not None and 0 <= run.server_cpu_seconds < 1
    assert run.foreign_cpu is not None and 0 <= run.foreign_cpu <= 1.1
    assert Run.model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize("server", ["reuse"], indirect=True)
def test_a_run_that_reuses_after_its_warm_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM")
    monkeypatch.setattr(measuring, "drive", send)
    reuse = STOCK.model_copy(update={"name": "reuse", "fusion": {"reuse": "licensed"}})
    made = replace(plan(loads=(CLOSED,)), arms=(FIRST, reuse), block_bytes={"reuse": 1000}, requests=REQUESTS)
    run, _ = measure(replace(made, warmup=REQUESTS[:1]), server, reuse, CLOSED, 2, lambda done: None)
    assert run.warmup is not None and run.warmup.requests == 1 and run.warmup.reuse is not None
    assert (run.warmup.reuse.audits, run.warmup.reuse.audits_until_licence) == (1, 1)
    assert run.reuse is not None and (run.reuse.audits, run.reuse.audits_until_licence) == (2, None)
    assert run.reuse.skipped_tokens == 2 and run.plugin_seconds == 3 * 2 + 2
    assert run.timeline.prompt_tokens_skipped is not None
    assert (run.timeline.prompt_tokens_skipped[0], run.timeline.prompt_tokens_skipped[-1]) == (0, 2)
    assert Run.model_validate_json(run.model_dump_json()) == run


def test_where_helpers_ran_steps_do_not_tell_requests(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM")
    monkeypatch.setattr(measuring, "drive", send)
    pages = iter([{"jointkv_prompt_tokens_skipped_total": 0.0}])
    after = {"jointkv_prompt_tokens_skipped_total": 4.0, "jointkv_reuse_helpers_total": 1.0, measuring.GENERATED: 6.0}
    after |= {measuring.FIRST_TOKENS: 2.0, measuring.COMPUTED_PROMPT: 2.0}
    after["vllm:num_requests_running"] = 0.0
    after |= {f"jointkv_{name}_total": 0.0 for name in measuring.PLUGIN_SECONDS}
    monkeypatch.setattr("jointkv.bench.watch.read", lambda url: dict(next(pages, after)))
    run, _ = run_of(server)
    assert (run.prompt_tokens_computed, run.recomputed_tokens, run.running_peak) == (20, 18, 0)


def test_a_fused_arm_without_the_plugin(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM")
    monkeypatch.setattr(measuring, "drive", send)
    with pytest.raises(ServerFailed, match="fused: the server runs without jointkv"):
        run_of(server, STOCK.model_copy(update={"name": "fused", "fusion": {}}))


def test_jointkv_switched_itself_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM")
    monkeypatch.setattr(measuring, "drive", send)
    plugin = {"jointkv_faults_total": 1.0, measuring.DISABLED: 1.0}
    monkeypatch.setattr("jointkv.bench.watch.read", lambda url: dict(plugin))
    with pytest.raises(ServerFailed, match=r"stock: jointkv switched itself off; .*log says why"):
        run_of(server)


def test_a_server_that_dies_under_load(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM")

    def die(spec: Spec, progress: Any, during: Any, cores: Any) -> None:
        with during:
            os.kill(min(pids(server)), 9)
            assert server._guard is not None
            server._guard.wait(20)
        raise LoadFailed("no request was answered")

    monkeypatch.setattr(measuring, "drive", die)
    with pytest.raises(ServerFailed, match=r"the server ended under load \(closed 1\)"):
        run_of(server)


def test_client_side_numbers() -> None:
    found = measuring._answered(outcome([answer(), answer(tokens=1), answer(error="gone")]))
    assert (found["completed"], found["failed"], found["output_tokens"]) == (2, 1, 12)
    assert found["tpot"].mean == pytest.approx(0.1) and found["itl"].p99 == pytest.approx(0.1)
    assert found["e2el"].mean == pytest.approx(1.5) and found["e2el"].p50 == pytest.approx(1.5)
    assert found["e2el"].p95 == pytest.approx(1.95)
    assert [each["itl"] for each in found["requests"]] == [0.1, None]
    assert measuring._answered(outcome([answer(tokens=1)]))["tpot"] is None


def timeline(seconds: list[float], running: list[float], usage: list[float]) -> Timeline:
    zero = [0.0] * len(seconds)
    return Timeline(seconds=seconds, running=running, waiting=zero, pool_usage=usage, preemptions=zero)


def test_means_are_over_the_run_and_peaks_over_everything() -> None:
    seen = timeline([0.0, 1.0, 2.0, 3.5], [0.0, 2.0, 4.0, 8.0], [0.0, 0.2, 0.4, 0.8])
    inside = measuring._inside(seen, 3.0)
    found = measuring._seen(seen, inside, [], 3.0)
    assert inside == [1, 2]
    assert (found["running_mean"], found["running_peak"]) == (3.0, 8.0)
    assert found["pool_usage_mean"] == pytest.approx(0.3)
    found = measuring._seen(seen, inside, [Step(3, 600, 1.0), Step(9, 9, 0.5)], 3.0)
    assert (found["running_mean"], found["running_peak"]) == (2.5, 9.0)
    assert measuring._inside(timeline([0.0, 0.4], [0.0, 0.0], [0.0, 0.0]), 0.2) == [0, 1]


@pytest.mark.parametrize(
    ("running", "tokens"),
    [
        (2.0, 105.5 + 105.5),  # both are half through their 11 tokens
        (1.0, 105.5),  # one of them was preempted
        (3.0, 105.5 + 105.5 + 50.0),  # one more is in prefill
    ],
)
def test_bytes_per_token_of_running_requests(running: float, tokens: float) -> None:
    seen = timeline([0.0, 1.5, 3.0], [0.0, running, 0.0], [0.0, 0.5, 0.0])
    answers = [answer(), answer(), answer(start=50.0)]
    found = measuring._bytes_per_token(seen, [1], answers, pool_bytes=10_000)
    assert found == pytest.approx(5_000 / tokens)


def test_bytes_per_token_of_nothing() -> None:
    assert measuring._bytes_per_token(timeline([0.0], [0.0], [0.0]), [0], [answer()], 10) is None
