"""A server's processes: started, refused, found dead, and all gone afterwards, whoever ends first."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jointkv.bench import server as serving
from jointkv.bench.server import Server, ServerFailed, free_port, server_command
from jointkv.errors import BadInput

STUB = Path(__file__).with_name("stub_server.py")
# As vLLM 0.32 writes it.
ITERATION = (
    "(APIServer pid=15233) INFO 11-21 08:22:46 [loggers.py:199] Engine 000: Iteration({}): 1 context requests, {} "
    "context tokens, 3 generation requests, {} generation tokens, iteration elapsed time: 7494.21 ms, CPU KV cache "
    "usage: 43.2%\n"
)


def stub(folder: Path, mode: str = "serve") -> Server:
    return Server([sys.executable, str(STUB), mode], os.environ, free_port(), folder / "logs" / "server.log")


def pids(server: Server) -> list[int]:
    return sorted(process.pid for process in server.processes())


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "GRACE_SECONDS", 0.5)


def test_it_starts_is_asked_and_leaves_nothing(tmp_path: Path) -> None:
    with stub(tmp_path) as server:
        assert not server.alive() and server.processes() == []
        server.start(30.0)
        assert server.alive()
        started, cpu = pids(server), server.cpu_seconds()
        assert len(started) == 2 and cpu > 0
        server.reset_prefix_cache()  # the first answer is no
        deadline = time.monotonic() + 20  # the system counts in hundredths of a second
        while server.cpu_seconds() <= cpu and time.monotonic() < deadline:
            serving.get(f"{server.url}/metrics")
        assert server.cpu_seconds() > cpu
    assert not server.alive() and not any(map(runs, started)) and server.processes() == []
    server.stop()


def test_a_port_in_use(tmp_path: Path) -> None:
    server = stub(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", server.port))
        other.listen()
        with pytest.raises(ServerFailed, match=f"port {server.port} cannot be used"):
            server.start()
    assert not server.log_file.exists()


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    server = stub(tmp_path, "die")
    with pytest.raises(ServerFailed) as failed:
        server.start(30.0)
    words = "ValueError: no room for the KV cache | RuntimeError: Engine core initialization failed"
    assert str(failed.value) == f"the server ended in start-up: {words} (log: {server.log_file})"


def test_a_server_that_does_not_answer_or_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = stub(tmp_path, "mute")
    seen: list[int] = []
    look = server.require_alive
    monkeypatch.setattr(server, "require_alive", lambda when: (look(when), seen.extend(pids(server))))
    with pytest.raises(ServerFailed, match="did not answer within 3 s, its log ends: loading"):
        server.start(3.0)
    assert seen and not any(map(runs, seen))


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    server = Server([str(tmp_path / "none")], os.environ, free_port(), tmp_path / "log")
    with pytest.raises(ServerFailed, match=r"could not be started: FileNotFoundError"):
        server.start()


def test_a_server_that_dies_later(tmp_path: Path) -> None:
    with stub(tmp_path) as server:
        server.start(30.0)
        started = pids(server)
        os.kill(started[0], signal.SIGKILL)
        deadline = time.monotonic() + 20
        while server.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(ServerFailed, match="the server ended under load: loading"):
            server.require_alive("under load")
        assert not any(map(runs, started))


@pytest.mark.parametrize("also_the_guard", [False, True])
def test_nothing_outlives_a_benchmark_that_was_killed(tmp_path: Path, also_the_guard: bool) -> None:
    program = f"""
import os, sys, time
sys.path.insert(0, {str(STUB.parent)!r})
from tests.bench.test_server import pids, stub, serving, Path
serving.GRACE_SECONDS = 0.5
server = stub(Path({str(tmp_path)!r}))
server.start(30.0)
print(*pids(server), server._guard.pid, flush=True)
if {also_the_guard}:
    os.kill(server._guard.pid, 9)
    server.stop()
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        started = list(map(int, benchmark.stdout.readline().split()))
        assert len(started) == 3 and (also_the_guard or all(map(runs, started)))
        if not also_the_guard:
            benchmark.kill()
        deadline = time.monotonic() + 20
        while any(map(runs, started)) and time.monotonic() < deadline:
            time.sleep(0.05)
        benchmark.kill()
    assert not any(map(runs, started))


def test_a_cache_that_cannot_be_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "RESET_SECONDS", 0.6)
    with stub(tmp_path, "refuse") as server:
        server.start(30.0)
        with pytest.raises(ServerFailed, match="pages are still in use"):
            server.reset_prefix_cache()
        server.url += "/elsewhere"
        with pytest.raises(ServerFailed, match="404"):
            server.reset_prefix_cache()


def test_steps_of_the_engine(tmp_path: Path) -> None:
    server = stub(tmp_path)
    server.log_file.parent.mkdir()
    server.log_file.write_text("nothing\n")
    assert server.steps() == []
    server.log_file.write_text(ITERATION.format(0, 610, 0) + "between\n" + ITERATION.format(1, 0, 6))
    assert server.steps() == [(4, 610, 7.49421), (4, 6, 7.49421)]


def test_both_arms_start_through_one_entry() -> None:
    stock = server_command("m", None, ["--dtype", "float32"])
    fused = server_command("m", {"max_relative_error": 0.1}, ["--dtype", "float32"], "cpu")
    assert stock[:4] == fused[:4] == [sys.executable, "-P", "-m", "jointkv.vllm_plugin.server"]
    assert stock[5:] == fused[5:] and stock[5] == "m" and stock[-2:] == ["--dtype", "float32"]
    assert json.loads(stock[4]) == {"options": None, "device": "auto"}
    assert json.loads(fused[4]) == {"options": {"max_relative_error": 0.1}, "device": "cpu"}
    with pytest.raises(BadInput, match="max_relative_error"):
        server_command("m", {"max_relativ_error": 0.1}, [])
