"""What the load generator's process is told, what is made of its answer, and that it ends in any case."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager, nullcontext

import pytest

from jointkv.bench import load_generator
from jointkv.bench.load_generator import LoadFailed, drive, spec_of
from jointkv.bench.load_process import LoadOutcome, Spec
from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Load

CLOSED = Load(kind="closed", concurrency=2)
REQUESTS = [ServingRequest((1, 2, 3), 4, 0.0), ServingRequest((5,), 2, 2.0), ServingRequest((6, 7), 1, 6.0)]
# Answers every request with its prompt; the behaviour asked for is the first argument.
CHILD = """
import json, sys, time
behaviour = sys.argv[1]
spec = json.loads(sys.stdin.readline())
say = lambda message: print(json.dumps(message), flush=True)
if behaviour == "dies":
    sys.exit("ImportError: no vllm here")
if behaviour == "error":
    say({"error": "ValueError: bad spec"})
    sys.exit(1)
say({"ready": True})
assert sys.stdin.readline() == "go\\n"
answers = []
for number, (prompt, tokens, at) in enumerate(spec["requests"]):
    say({"finished": number + 1})
    if behaviour == "dies late":
        sys.exit("Killed")
    error = "Bad Request" if behaviour == "fails" or number == 1 and behaviour == "fails once" else None
    answers.append(dict(start=at or 0.0, prompt_tokens=len(prompt), output_tokens=tokens, ttft=0.1, itl=None, itls=[],
        e2el=0.2, text=str(prompt), error=error))
rates = dict.fromkeys(["seconds", "output_tokens_per_s", "total_tokens_per_s", "requests_per_s"], 1.0)
say({"outcome": {"began": 1.5, "cpu_seconds": 0.1, "answers": answers, **rates}})
if behaviour == "hangs":
    time.sleep(600)
"""


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(load_generator, "COMMAND", (sys.executable, "-c", CHILD, getattr(request, "param", "answers")))
    monkeypatch.setattr(load_generator, "SHUTDOWN_SECONDS", 0.5)


def spec(load: Load = CLOSED) -> Spec:
    return spec_of("http://here", "m", "t", load, REQUESTS, 7)


def run(load: Load = CLOSED) -> LoadOutcome:
    return drive(spec(load), lambda done: None, nullcontext())


@pytest.mark.usefixtures("child")
def test_progress_and_what_surrounds_the_load() -> None:
    events: list[object] = []

    @contextmanager
    def during():
        events.append("begin")
        yield
        events.append("end")

    outcome = drive(spec(), events.append, during())
    assert events == ["begin", 1, 2, 3, "end"]
    assert [answer.text for answer in outcome.answers] == ["[1, 2, 3]", "[5]", "[6, 7]"]
    assert (outcome.began, outcome.cpu_seconds) == (1.5, 0.1)


@pytest.mark.usefixtures("child")
def test_a_replay_is_sent_at_the_times_of_the_log() -> None:
    outcome = run(Load(kind="replay", speed=2.0))
    assert [(answer.text, answer.start) for answer in outcome.answers] == [
        ("[1, 2, 3]", 0.0),
        ("[5]", 1.0),
        ("[6, 7]", 3.0),
    ]


@pytest.mark.usefixtures("child")
@pytest.mark.parametrize("child", ["fails once"], indirect=True)
def test_some_failed_requests_are_part_of_the_outcome() -> None:
    assert [answer.error for answer in run().answers] == [None, "Bad Request", None]


@pytest.mark.usefixtures("child")
@pytest.mark.parametrize(
    ("child", "words"),
    [
        ("dies", "ImportError: no vllm here"),
        ("dies late", "Killed"),
        ("error", "ValueError: bad spec"),
        ("fails", "no request was answered completely; the first one: Bad Request"),
    ],
    indirect=["child"],
)
def test_failures_say_why(words: str) -> None:
    with pytest.raises(LoadFailed, match=words):
        run()


@pytest.mark.usefixtures("child")
@pytest.mark.parametrize("child", ["hangs"], indirect=True)
def test_a_process_that_does_not_end_is_ended() -> None:
    started = time.monotonic()
    assert len(run().answers) == 3
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (CLOSED, (None, 1.0, 2)),
        (Load(kind="one_first"), (None, 1.0, None)),
        (Load(kind="poisson", rate=0.5), (0.5, 1.0, None)),
        (Load(kind="bursty", rate=0.5, burstiness=0.3), (0.5, 0.3, None)),
        (Load(kind="replay", speed=2.0), (None, 1.0, None)),
    ],
)
def test_the_load_in_the_words_of_vllm(load: Load, expected: tuple[object, ...]) -> None:
    made = spec(load)
    assert (made.rate, made.burstiness, made.concurrency) == expected and made.seed == 7
    assert (made.requests[0][2] is not None) == (load.kind == "replay")
    assert made.one_first == (load.kind == "one_first")
    assert made.turns == [(None, 0.0, None)] * 3
