"""`jointkv serve` as a user runs it: processes, HTTP, an ordinary client, signals."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jointkv.cli import main
from jointkv.system.guard import kill, living
from jointkv.vllm_plugin import engine_args, server

pytest.importorskip("vllm")

MODEL = "smollm2"
STARTS_WITHIN_S = 280.0
SHARED = """You answer questions of customers of a small bookshop, politely and in one sentence.
Question: Do you have the new atlas of the Alps? Answer: Yes, it lies on the table beside the door.
Question: When do you open on Saturday? Answer: We open at nine and close at one.
Question: Can I bring a book back? Answer: Within two weeks, if it looks like new.
Question: Do you wrap presents? Answer: Gladly, and we charge nothing for it.
Question: Where can I leave my bicycle? Answer: In the yard behind the house.
"""
GENERATE = {"model": MODEL, "temperature": 0.0}


@dataclass
class Server:
    """A running `jointkv serve`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def metrics(self) -> dict[str, float]:
        """The plugin's own metrics; labels other than vLLM's own behind the name."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        found = {}
        for line in lines:
            if line.startswith("jointkv_"):
                name, value = line.rsplit(" ", 1)
                found[re.sub(r'(engine|model_name)="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")] = float(
                    value
                )
        return found

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"the server did not come up:\n{self.log.read_text()[-6000:]}")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from jointkv.hf.models import fetch_model

    fetch_model(MODEL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [str(Path(sys.executable).parent / "jointkv"), "serve", MODEL, "--min-pool-usage", "0"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "384"]
    command += ["--block-size", "32", "--max-num-seqs", "4", "--enforce-eager"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
            start_new_session=True,
        )
    try:
        started = Server(process, port, log)
        started.wait_until_ready()
        yield started
    finally:
        kill(process.pid)
        process.wait()


@pytest.fixture
def client(running: Server) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", timeout=120.0, max_retries=0)


def prompt(number: int) -> str:
    return f"Conversation {number}.\n{SHARED}Question: Do you sell maps? Answer:"


@pytest.mark.real_model
@pytest.mark.timeout(400)
def test_an_ordinary_client_is_answered(running: Server, client: Any) -> None:
    assert [model.id for model in client.models.list().data] == [MODEL]
    text = client.completions.create(prompt="The capital of France is", max_tokens=4, **GENERATE).choices[0].text
    assert "Paris" in text
    messages = [{"role": "user", "content": "Name the capital of France."}]
    whole = client.chat.completions.create(messages=messages, max_tokens=8, **GENERATE).choices[0].message.content
    parts = client.chat.completions.create(messages=messages, max_tokens=8, stream=True, **GENERATE)
    assert "Paris" in whole and "".join(part.choices[0].delta.content or "" for part in parts) == whole
    assert "jointkv is live" in running.log.read_text()


@pytest.mark.real_model
def test_near_duplicates_merge_while_the_first_one_still_runs(running: Server, client: Any) -> None:
    before = running.metrics()
    first = client.completions.create(prompt=prompt(4711), max_tokens=200, stream=True, **GENERATE)
    next(iter(first))
    alone = running.metrics()
    second = client.completions.create(prompt=prompt(8302), max_tokens=8, **GENERATE).choices[0].text
    after = running.metrics()
    rest = list(itertools.islice(first, 1))
    first.close()
    assert rest, "the first request was to run longer than the second"
    assert alone["jointkv_blocks_merged_total"] == before["jointkv_blocks_merged_total"]

    merged = after["jointkv_blocks_merged_total"]
    assert merged >= 3 and after["jointkv_pages_freed_total"] == merged
    assert after["jointkv_blocks_considered_total"] > merged
    assert after["jointkv_relative_error_count"] == merged
    assert after['jointkv_relative_error_bucket{le="0.2"}'] == merged  # the bound
    assert after['jointkv_relative_error_bucket{le="0.0"}'] < merged
    assert after['jointkv_state{state="active"}'] == 1 and after['jointkv_state{state="inert"}'] == 0
    assert after["jointkv_compare_seconds_total"] > 0 and after["jointkv_faults_total"] == 0
    # Read from the other request's pages, in an engine that holds a page of its own for everything else.
    own = client.completions.create(
        prompt=prompt(8302), max_tokens=8, extra_body={"vllm_xargs": {"jointkv": False}}, **GENERATE
    )
    assert second == own.choices[0].text


@pytest.mark.real_model
@pytest.mark.parametrize(
    "apart", [{"vllm_xargs": {"jointkv": False}}, {"cache_salt": "another tenant"}], ids=["opted-out", "salted"]
)
def test_requests_that_keep_to_themselves(running: Server, client: Any, apart: dict[str, Any]) -> None:
    before = running.metrics()["jointkv_blocks_merged_total"]
    client.completions.create(prompt=prompt(1905), max_tokens=2, extra_body=apart, **GENERATE)
    assert running.metrics()["jointkv_blocks_merged_total"] == before
    client.completions.create(prompt=prompt(2716), max_tokens=2, **GENERATE)
    assert running.metrics()["jointkv_blocks_merged_total"] > before


@pytest.mark.real_model
@pytest.mark.parametrize("said", ["nonsense", "", 2, [0]])
def test_a_wish_that_is_not_understood_is_the_clients_error(running: Server, client: Any, said: Any) -> None:
    from openai import BadRequestError

    body = {"vllm_xargs": {"jointkv": said}}
    with pytest.raises(BadRequestError, match="'jointkv' is neither true nor false"):
        client.completions.create(prompt=prompt(1), max_tokens=2, extra_body=body, **GENERATE)
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(BadRequestError, match="'jointkv' is neither true nor false"):
        client.chat.completions.create(messages=messages, max_tokens=2, extra_body=body, **GENERATE)
    assert client.completions.create(prompt="Hello", max_tokens=1, **GENERATE).choices


@pytest.mark.real_model
def test_who_scores_a_prompt_gets_what_the_model_says(running: Server, client: Any) -> None:
    alone = 'jointkv_requests_left_alone_total{reason="prompt_logprobs"}'
    before = running.metrics()
    echo = {"max_tokens": 1, "echo": True, "logprobs": 1, **GENERATE}
    for number in (5120, 6233):
        client.completions.create(prompt=prompt(number), **echo)
        client.completions.create(prompt=prompt(number), max_tokens=1, extra_body={"prompt_logprobs": 0}, **GENERATE)
    after = running.metrics()
    assert after[alone] == before[alone] + 4
    assert after["jointkv_blocks_merged_total"] == before["jointkv_blocks_merged_total"]


@pytest.mark.real_model
def test_sigterm_ends_the_server_and_all_its_processes(running: Server) -> None:
    assert len(living(running.process.pid)) > 1
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(timeout=60) == 0
    deadline = time.monotonic() + 20
    while living(running.process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert living(running.process.pid) == []


OPTIONS = {"reuse": "auto", "max_relative_error": 0.1, "scope": "both", "key_threshold": 0.5}
FLAGS = ["--max-relative-error", "0.1", "--scope", "both", "--fuse", "key_threshold=0.5", "--max-model-len", "64"]


def parsed(arguments: list[str]) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return AsyncEngineArgs.from_cli_args(make_arg_parser(FlexibleArgumentParser()).parse_args(arguments))


def assert_same_engine(found: Any, model: str) -> None:
    from vllm.config import KVTransferConfig

    expected = engine_args(**OPTIONS)
    assert (found.model, found.max_model_len, found.worker_cls) == (model, 64, expected["worker_cls"])
    assert (found.scheduler_cls, found.logits_processors) == (expected["scheduler_cls"], expected["logits_processors"])
    configs = [
        asdict(config) for config in (found.kv_transfer_config, KVTransferConfig(**expected["kv_transfer_config"]))
    ]
    for config in configs:
        del config["engine_id"]  # drawn anew every time
    assert configs[0] == configs[1]


def test_the_plain_flags_give_the_same_engine(calm: Path) -> None:
    result = CliRunner().invoke(main.app, ["serve", str(calm), "--dry-run", *FLAGS])
    arguments = shlex.split(result.stdout)
    assert_same_engine(parsed(arguments[arguments.index("--model") :]), str(calm))


def test_the_server_hands_vllm_the_same_flags(calm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand

    started: list[Any] = []
    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(started.append))
    launch = server.Launch(OPTIONS).to_json()
    monkeypatch.setattr(sys, "argv", ["server", launch, str(calm), "--max-model-len", "64"])
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # what vLLM changes is undone with the test
    server.main()
    started[0].model = started[0].model_tag  # as `vllm serve` does
    assert_same_engine(AsyncEngineArgs.from_cli_args(started[0]), str(calm))
    assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ  # which model runner there is, vLLM decides


def test_vllms_own_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr(sys, "argv", ["server", server.Launch(None).to_json(), "--help=max-model-len"])
    with pytest.raises(SystemExit) as ended:
        server.main()
    assert ended.value.code == 0 and "--max-model-len" in capsys.readouterr().out


def test_ctrl_c_while_the_server_starts(calm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback of vLLM's start is long, and nothing is wrong."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    def pressed(arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(pressed))
    monkeypatch.setattr(sys, "argv", ["server", server.Launch(OPTIONS).to_json(), str(calm)])
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with pytest.raises(SystemExit) as ended:
        server.main()
    assert ended.value.code == 130
