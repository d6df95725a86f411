"""What the load generator's process is told, what is made of its answer, and that it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from jointkv.bench import load_generator
from jointkv.bench.load_generator import LoadFailed, drive
from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Load
from jointkv.errors import BadInput

CLOSED = Load(kind="closed", concurrency=2)
REQUESTS = [ServingRequest((1, 2, 3), 4, 9.0), ServingRequest((5,), 2, 3.0), ServingRequest((6, 7), 1, 5.0)]
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
    answers.append(dict(start=at or 0.0, prompt_tokens=len(prompt), output_tokens=tokens, ttft=0.1, itls=[], e2el=0.2,
        text=str(prompt), error=error))
say({"outcome": {"began": 1.5, "cpu_seconds": 0.1, "answers": answers, "totals": {"rate": spec["rate"] or 0.0}}})
if behaviour == "hangs":
    time.sleep(60)
"""


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(load_generator, "COMMAND", (sys.executable, "-c", CHILD, getattr(request, "param", "answers")))
    monkeypatch.setattr(load_generator, "SHUTDOWN_SECONDS", 0.5)


def run(
    load: Load = CLOSED, requests: list[ServingRequest] = REQUESTS, **options: object
) -> load_generator.LoadOutcome:
    return drive("http://here", "m", "t", load, requests, 0, lambda done: None, **options)


@pytest.mark.usefixtures("child")
def test_progress_and_what_surrounds_the_load() -> None:
    events: list[object] = []

    @contextmanager
    def during():
        events.append("begin")
        yield
        events.append("end")

    outcome = drive("http://here", "m", "t", CLOSED, REQUESTS, 0, events.append, during=during())
    assert events == ["begin", 1, 2, 3, "end"]
    assert [answer.text for answer in outcome.answers] == ["[1, 2, 3]", "[5]", "[6, 7]"]
    assert (outcome.began, outcome.cpu_seconds) == (1.5, 0.1)


@pytest.mark.usefixtures("child")
def test_a_replay_is_sent_in_the_order_of_time_and_returned_in_the_order_of_requests() -> None:
    outcome = run(Load(kind="replay", speed=2.0))
    assert [(answer.text, answer.start) for answer in outcome.answers] == [
        ("[1, 2, 3]", 3.0),
        ("[5]", 0.0),
        ("[6, 7]", 1.0),
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
    assert time.monotonic() - started < 10


def test_what_cannot_be_sent() -> None:
    with pytest.raises(BadInput, match="no requests"):
        run(requests=[])
    with pytest.raises(BadInput, match="timestamp"):
        run(Load(kind="replay", speed=1.0), [*REQUESTS, ServingRequest((1,), 1)])


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (CLOSED, (None, 1.0, 2)),
        (Load(kind="poisson", rate=0.5), (0.5, 1.0, None)),
        (Load(kind="bursty", rate=0.5, burstiness=0.3), (0.5, 0.3, None)),
        (Load(kind="replay", speed=2.0), (None, 1.0, None)),
    ],
)
def test_the_load_in_the_words_of_vllm(load: Load, expected: tuple[object, ...]) -> None:
    _, spec = load_generator._spec("u", "m", "t", load, REQUESTS, 7)
    assert (spec.rate, spec.burstiness, spec.concurrency) == expected and spec.seed == 7
    assert (spec.requests[0][2] is not None) == (load.kind == "replay")


def test_an_answer_with_too_few_tokens_has_failed() -> None:
    found = {
        "start_times": [11.0, 10.0, 12.0],
        "errors": ["", "", "Traceback\nClientError: gone\n"],
        "output_lens": [4, 3, 0],
        "input_lens": [3, 1, 2],
        "ttfts": [0.1, 0.1, 0.0],
        "itls": [[0.1], [], []],
        "latencies": [0.5, 0.2, 0.0],
        "generated_texts": ["a", "b", ""],
        "duration": 2,
        "mean_ttft_ms": 100.0,
        "rtfx": 0.0,
    }
    outcome = load_generator._readable(found, [4, 4, 4])
    assert outcome["began"] == 10.0 and outcome["totals"] == {"duration": 2.0, "mean_ttft_ms": 100.0}
    assert [answer["start"] for answer in outcome["answers"]] == [1.0, 0.0, 2.0]
    assert [answer["error"] for answer in outcome["answers"]] == [None, "3 of 4 tokens came", "ClientError: gone"]


@pytest.mark.parametrize("already_sending", [False, True])
def test_it_ends_with_the_process_that_started_it(already_sending: bool) -> None:
    program = (
        "import time; from jointkv.bench import load_generator as g\n"
        "g.generate = lambda spec, notify, wait: (notify({'ready': True}), wait(), time.sleep(60))\n"
        "g.main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path("/")
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        _, spec = load_generator._spec("u", "m", "t", CLOSED, REQUESTS, 0)
        process.stdin.write(json.dumps(load_generator.asdict(spec)) + "\n" + "go\n" * already_sending)
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"ready": True}
        time.sleep(0.3)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(10) == 1
