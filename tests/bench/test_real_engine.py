"""The serving benchmark's engine-facing half with vLLM: its load generator against a stub, and a real fused server."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jointkv.bench.divergence import Parting, ask
from jointkv.bench.environment import server_environment
from jointkv.bench.load_generator import spec_of
from jointkv.bench.load_process import Answer, generate
from jointkv.bench.measure import measure
from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import NEAR_TIE, Load
from jointkv.bench.run import make_result
from jointkv.bench.scoring import runner, with_scores
from jointkv.bench.server import Server, free_port, server_command
from jointkv.bench.warm import warm_up
from tests.bench.plans import arm, plan
from tests.bench.plans import run as bench_run
from tests.bench.test_server import STUB, pids, runs
from tests.vllm_plugin.conftest import _vllm_environment  # noqa: F401

pytest.importorskip("vllm")

from tests.vllm_plugin.engines import write_model

MODEL = "smollm2"
BLOCK, POOL = 32, 200
BLOCK_BYTES = BLOCK * 30 * 3 * 64 * 2 * 4  # tokens, layers, heads, head size, K and V, float32
SHARED = """You answer questions of customers of a small bookshop, politely and in one sentence.
Question: Do you have the new atlas of the Alps? Answer: Yes, it lies on the table beside the door.
Question: When do you open on Saturday? Answer: We open at nine and close at one.
Question: Can I bring a book back? Answer: Within two weeks, if it looks like new.
Question: Do you wrap presents? Answer: Gladly, and we charge nothing for it.
"""


@pytest.fixture(scope="module")
def tokenizer() -> str:
    from jointkv.hf.models import fetch_model

    return str(fetch_model(MODEL))


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("stub") / "log"
    with Server([sys.executable, str(STUB), "serve"], os.environ, free_port(), log) as server:
        server.start(30.0)
        yield server.url


class Clock:
    """In place of `time` and `asyncio` in vLLM's load generator: who sleeps there has slept at once.

    Attributes:
        now: seconds.
        sent: when each request was.
    """

    def __init__(self) -> None:
        self.now, self.sent = 0.0, list[float]()

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio if hasattr(asyncio, name) else time, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    from vllm.benchmarks import serve

    clock, arrivals = Clock(), serve.get_request

    async def noted(*args: Any) -> AsyncIterator[Any]:
        clock.now, clock.sent = 0.0, []
        async for arrival in arrivals(*args):
            clock.sent.append(clock.now)
            yield arrival

    monkeypatch.setattr(serve, "time", clock)
    monkeypatch.setattr(serve, "asyncio", clock)
    monkeypatch.setattr(serve, "get_request", noted)
    return clock


def answers(url: str, tokenizer: str, load: Load, requests: list[ServingRequest], seed: int = 0) -> list[Answer]:
    """Of the stub, in the order of the requests; vLLM's load generator runs in this process."""
    said: list[Any] = []
    found = generate(spec_of(url, MODEL, tokenizer, load, requests, seed), said.append, lambda: None)
    assert said == [{"ready": True}, *({"finished": number + 1} for number in range(len(requests)))]
    for answer, request in zip(found.answers, requests, strict=True):
        assert (answer.error, answer.text, answer.output_tokens) == (None, "<s> 1 2 3 4", 5)
        assert len(answer.itls) == 4 and answer.e2el == pytest.approx(answer.ttft + sum(answer.itls))
        assert answer.prompt_tokens == len(request.prompt)
    assert found.output_tokens_per_s == pytest.approx(5 * len(requests) / found.seconds)
    return found.answers


def test_arrivals_of_every_kind(stub: str, tokenizer: str, clock: Clock) -> None:
    few = [ServingRequest((1, 2, 3), 5, at) for at in (0.0, 0.4, 1.0)]

    def sent(load: Load, seed: int = 0) -> list[float]:
        answers(stub, tokenizer, load, few * 3, seed)
        return clock.sent

    closed = answers(stub, tokenizer, Load(kind="closed", concurrency=1), few)
    assert all(first.start + first.e2el <= later.start for first, later in itertools.pairwise(closed))
    answers(stub, tokenizer, Load(kind="replay", speed=2.0), few)
    assert clock.sent == pytest.approx([0.0, 0.2, 0.5])
    poisson = [sent(Load(kind="poisson", rate=9.0), seed) for seed in (0, 0, 1)]
    assert poisson[0] == poisson[1] != poisson[2]
    bursty = sent(Load(kind="bursty", rate=9.0, burstiness=0.1))
    assert poisson[0][-1] == pytest.approx(1.0) == bursty[-1]
    gaps, even = (sorted(b - a for a, b in itertools.pairwise(times)) for times in (bursty, poisson[0]))
    assert gaps[4] < even[4]


def test_one_first_then_all(tokenizer: str, tmp_path: Path) -> None:
    """The stub's first answer goes on behind its first token when the others are there."""
    requests = [ServingRequest((number, 2, 3), 5) for number in range(4)]
    with Server([sys.executable, str(STUB), "together"], os.environ, free_port(), tmp_path / "log") as server:
        server.start(30.0)
        first, *others = answers(server.url, tokenizer, Load(kind="one_first"), requests)
    # Waiting for the first one is no part of their times.
    assert first.start == 0.0 and all(first.ttft <= answer.start < first.e2el for answer in others)


@pytest.fixture(scope="module")
def server(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = f"--served-model-name {MODEL} --dtype float32 --block-size {BLOCK} --num-gpu-blocks-override {POOL}"
    flags += " --max-num-seqs 16 --max-model-len 1100 --enforce-eager"
    command = server_command(tokenizer, {"min_pool_usage": 0.0}, flags.split())
    environment = server_environment(os.environ, {0}, POOL * BLOCK_BYTES, local_model=True)
    log = tmp_path_factory.mktemp("serving") / "server.log"
    with Server(command, environment, free_port(), log) as started:
        started.start(280.0)
        yield started


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_arms_that_give_the_answers_of_the_reference(tmp_path: Path) -> None:
    draw = random.Random(0)
    text = [draw.randrange(512) for _ in range(4 * BLOCK)]
    requests = tuple(ServingRequest((*(draw.randrange(512) for _ in range(BLOCK)), *text), 8) for _ in range(6))
    exact = {"min_pool_usage": 0.0, "max_relative_error": 0.0}
    lossy = {"min_pool_usage": 0.0, "max_relative_error": 0.9, "max_token_error": None}
    arms = (arm("stock", 60), arm("exact", 60, fusion=exact), arm("lossy", 60, fusion=lossy))
    flags = f"--dtype float32 --block-size {BLOCK} --max-model-len 256 --max-num-seqs 4 --enforce-eager"
    made = plan(loads=(Load(kind="closed", concurrency=6),))
    made = replace(made, arms=arms, requests=requests, location=str(write_model(tmp_path, 0.3)))
    made = replace(made, block_bytes=dict.fromkeys(("stock", "exact", "lossy"), BLOCK_BYTES))
    made.facts["common_flags"][:] = [*flags.split(), "--skip-tokenizer-init"]  # type: ignore[index]

    @contextmanager
    def stages(first: str) -> Iterator[Any]:
        yield lambda said: None

    runs = {(each.name, made.loads[0].label, 1): bench_run(each.name, made.loads[0]) for each in arms}
    result = make_result(made, SimpleNamespace(runs=runs, outputs={}), complete=True)  # type: ignore[arg-type]
    exact_row, lossy_row = with_scores(result, made, runner(os.environ, made, {0}, stages), 6).scores or ()
    assert (exact_row.kl, exact_row.top1, exact_row.pages_freed, exact_row.positions) == (0.0, 1.0, 0, 48)
    assert lossy_row.pages_freed and 0 < lossy_row.kl <= lossy_row.kl_worst_request and lossy_row.top1 <= 1


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_fused_run(server: Server, tokenizer: str) -> None:
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    prompts = [f"Conversation {number * 7919}.\n{SHARED}Question: Do you sell maps? Answer:" for number in range(6)]
    requests = tuple(ServingRequest(tuple(encode(prompt).input_ids), 8) for prompt in prompts)
    fused = arm("fused", POOL, fusion={"min_pool_usage": 0.0})
    load = Load(kind="closed", concurrency=6)
    made = replace(plan(loads=(load,)), arms=(fused,), requests=requests, model=MODEL, location=tokenizer)
    made = replace(made, block_bytes={"fused": BLOCK_BYTES})

    warm_up(server, MODEL, requests)
    run, texts = measure(made, server, fused, load, 1, lambda done: None)
    assert (run.completed, run.failed, run.output_tokens) == (6, 0, 48) and len(texts) == 6 and all(texts)
    assert run.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert run.output_tokens_per_s == pytest.approx(48 / run.seconds)
    assert 0 < run.ttft.p50 <= run.e2el.p50 <= run.seconds
    # Prefills of several requests, each computed once, and 7 more steps.
    assert run.recomputed_tokens == 0 and run.preemptions == 0
    assert run.fusion is not None and run.pages_freed == run.fusion["blocks_merged"] > 0
    assert run.fusion["blocks_considered"] >= run.fusion["blocks_merged"]
    assert run.plugin_seconds is not None and 0 < run.plugin_seconds < run.seconds
    # One core computes; a little more for the API server.
    assert run.server_cpu_seconds is not None and 0.3 * run.seconds < run.server_cpu_seconds < 2 * run.seconds
    assert run.foreign_cpu is not None and 0 <= run.foreign_cpu <= 1
    assert 0 < run.pool_usage_peak < 1 and run.running_peak == 6 and 1 < run.running_mean <= 6
    (token, *_) = encode(texts[0], add_special_tokens=False).input_ids
    same, unlikely = (Parting("fused", load.label, 1, 0, (), token, other) for other in (token, encode.eos_token_id))
    certain, no_tie = ask(server, made, [same, unlikely])
    assert (certain.gap, certain.least) == (0.0, False) and no_tie.gap > NEAR_TIE and not no_tie.near_tie
    started = pids(server)
    assert len(started) > 2
    server.stop()
    assert not any(map(runs, started))
