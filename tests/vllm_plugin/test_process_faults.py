"""Processes that are killed or told to end: the engine ends with an error, and no process outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytest.importorskip("vllm")

from jointkv.system.guard import kill, living
from tests.vllm_plugin.engines import WATCHED
from tests.vllm_plugin.test_dashboard import free_port

OUT = 4000

SCRIPT = """
import os, sys
os.sched_setaffinity(0, range(os.cpu_count()))
from vllm import LLM, SamplingParams
from tests.vllm_plugin.engines import WATCHED, near_prefix
from jointkv.vllm_plugin import engine_args

def main():
    attached = engine_args(**WATCHED) if sys.argv[2] == "fused" else {}
    llm = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, num_gpu_blocks_override=400, max_model_len=2048,
        block_size=32, skip_tokenizer_init=True, tensor_parallel_size=2, **attached,
    )
    params = SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in near_prefix(4, shared=320)]
    llm.generate(prompts[:1], SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
    print("SERVING", flush=True)
    llm.generate(prompts, params, use_tqdm=False)
    print("FINISHED", flush=True)

if __name__ == "__main__":
    main()
"""


@dataclass
class Running:
    """A command in a session of its own, and its log."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, reached: Callable[[], bool], seconds: float = 280.0) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-6000:]
            time.sleep(0.1)

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: text in self.log.read_text(errors="replace")

    def named(self, part: str) -> list[int]:
        """Its processes whose command line, which vLLM sets, has `part`."""
        found = []
        for process in living(self.process.pid):
            with suppress(psutil.Error):
                if part in " ".join(process.cmdline()):
                    found.append(process.pid)
        return found

    def assert_ends(self, seconds: float) -> int:
        """The exit code; nothing of it runs any more."""
        code = self.process.wait(seconds)
        deadline = time.monotonic() + 20
        while living(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert living(self.process.pid) == [], self.log.read_text()[-3000:]
        return code


@contextmanager
def started(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[Running]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        yield Running(process, log)
    finally:
        kill(process.pid)
        process.wait()


@pytest.mark.hazard(
    "Faults",
    "a worker is killed while it serves",
    "the engine ends with an error, as stock vLLM does; it does not hang, and no process is left",
)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want two cores")
@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize("arm", ["fused", "stock"])
def test_a_worker_is_killed(calm: Path, tmp_path: Path, arm: str) -> None:
    """The engine's own process is no victim: without it, the client of vLLM 0.32 waits for ever, stock or fused."""
    script = tmp_path / "two_ranks.py"
    script.write_text(SCRIPT)
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    with started([sys.executable, str(script), str(calm), arm], tmp_path / "log", environment) as running:
        running.wait_for(running.says("SERVING"))
        time.sleep(1.0)
        (number,) = running.named("Worker_TP1")
        os.kill(number, signal.SIGKILL)
        assert running.assert_ends(60.0) != 0
        assert not running.says("FINISHED")()


@contextmanager
def serving(model: str, log: Path) -> Iterator[tuple[Running, int]]:
    port = free_port()
    command = [str(Path(sys.executable).parent / "jointkv"), "serve", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "8192", "--block-size", "32"]
    command += ["--max-num-seqs", "4", "--enforce-eager", "--min-pool-usage", str(WATCHED["min_pool_usage"])]
    with started(command, log, {"VLLM_LOGGING_LEVEL": "INFO"}) as running:
        yield running, port


@pytest.mark.hazard(
    "Faults",
    "SIGTERM to `jointkv serve`: as it starts, while the model loads, while requests are answered",
    "it ends within a minute with all its processes; vLLM, stock as well, loses a signal while it loads: send it again",
)
@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize("phase", ["starting", "loading", "answering"])
def test_sigterm_to_a_server(tmp_path: Path, phase: str) -> None:
    from tests.cli.commands import save_tiny

    model = save_tiny(tmp_path / "tiny", tokens=8192, end_token=2, head_size=32)
    with serving(model, tmp_path / "log") as (running, port):
        if phase == "starting":
            running.wait_for(lambda: bool(living(running.process.pid)))
            time.sleep(2.0)
        elif phase == "loading":
            running.wait_for(lambda: bool(running.named("EngineCore")))
            running.process.send_signal(signal.SIGTERM)
            running.wait_for(running.says("Application startup complete"))
        else:
            running.wait_for(running.says("Application startup complete"))
            body = {"model": model, "prompt": "How many apples?", "max_tokens": OUT, "ignore_eos": True, "stream": True}
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            answer = urllib.request.urlopen(asked, timeout=60)
            assert answer.readline().startswith(b"data: ")
        running.process.send_signal(signal.SIGTERM)
        code = running.assert_ends(60.0)
        assert code != -signal.SIGKILL if phase == "starting" else code == 0
