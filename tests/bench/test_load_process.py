"""What is made of the numbers of vLLM's load generator, and that its process ends with the one that started it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jointkv.bench.load_process import Spec, outcome_of

SPEC = Spec(
    **{"url": "u", "model": "m", "tokenizer": "t", "requests": [([1], 2, None)], "rate": None, "burstiness": 1.0},
    **{"concurrency": 1, "seed": 0, "one_first": False},
)


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
        "output_throughput": 3.5,
        "total_token_throughput": 6.5,
        "request_throughput": 1.5,
        "mean_ttft_ms": 100.0,
    }
    outcome = outcome_of(found, [4, 4, 4], cpu_seconds=0.5)
    assert (outcome.began, outcome.seconds, outcome.output_tokens_per_s) == (10.0, 2.0, 3.5)
    assert [answer.start for answer in outcome.answers] == [1.0, 0.0, 2.0]
    assert [answer.itl for answer in outcome.answers] == [0.1, None, None]
    assert [answer.error for answer in outcome.answers] == [None, "3 of 4 tokens came", "ClientError: gone"]
    assert outcome.complete == outcome.answers[:1]


@pytest.mark.parametrize("already_sending", [False, True])
def test_it_ends_with_the_process_that_started_it(already_sending: bool) -> None:
    program = (
        "import time; from jointkv.bench import load_process as g\n"
        "g.generate = lambda spec, notify, wait: (notify({'ready': True}), wait(), time.sleep(600))\n"
        "g.main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path("/")
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(SPEC.model_dump_json() + "\n" + "go\n" * already_sending)
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"ready": True}
        time.sleep(0.3)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(60) == 1
