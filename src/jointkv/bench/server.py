"""One server as a process tree of its own: started, waited for, asked what it costs, and never left behind."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil

from jointkv.errors import JointKVError
from jointkv.system import guard
from jointkv.vllm_plugin import PluginSettings
from jointkv.vllm_plugin.server import Device, Launch

HOST = "127.0.0.1"
GRACE_SECONDS = 10.0
RESET_SECONDS = 30.0
ANSWER_SECONDS = 600.0
"""That one answer may take, of a server that has others to give."""
POLL_SECONDS = 0.25
LOG_LINES = 3
# Of every arm alike. A line for each step says what no metric does; see `Step`.
COMMON_FLAGS = ("--enable-logging-iteration-details", "--disable-uvicorn-access-log")
STEP = re.compile(
    rb"Iteration\(\d+\): (\d+) context requests, (\d+) context tokens, "
    rb"(\d+) generation requests, (\d+) generation tokens, iteration elapsed time: ([\d.]+) ms"
)
# The last line of a traceback, or of an argument parser, behind whatever a logger wrote before it.
REASON = re.compile(
    r"(?:^|[\])] )((?:\w+\.)*(?!\w*Warning)[A-Z]\w*[a-z]\w*: \S.*|Value error, .*|\S+(?: \w+)*: error: .*)$"
)
# A proxy is for other machines.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerFailed(JointKVError, RuntimeError):
    """A server did not start, ended, or did not do what it was told. The message ends with what its log says."""


class Step(NamedTuple):
    """What the engine did in one step: requests worked on, tokens computed, those computed again too, and seconds."""

    requests: int
    tokens: int
    seconds: float


def get(url: str, timeout: float = 10.0, body: Any = None) -> bytes:
    """What `url` answers; a `body` is posted as JSON.

    Raises:
        OSError: no answer, or one that is not a success.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with _OPENER.open(request, timeout=timeout) as answer:
        return bytes(answer.read())


def server_command(
    model: str, fusion: Mapping[str, Any] | None, flags: Sequence[str], device: Device = "auto"
) -> list[str]:
    """The command that serves `model`; a stock server starts through the same entry as a fused one.

    Args:
        fusion: options of `PluginSettings`; None leaves the plugin out.
        flags: of `vllm serve`; host and port are added by `Server`.

    Raises:
        BadInput, InvalidPolicy: see `PluginSettings.parse`.
    """
    options = None if fusion is None else dict(fusion)
    if options is not None:
        PluginSettings.parse(options)
    launch = Launch(options, device).to_json()
    # -P: a folder named vllm where the user happens to be must not be imported.
    return [sys.executable, "-P", "-m", "jointkv.vllm_plugin.server", launch, model, *COMMON_FLAGS, *flags]


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """A server on this machine. Leaving the context ends it and all its processes, however it is left.

    Args:
        command: what to run; `--host` and `--port` are added to it.
        log_file: takes everything the server writes; replaced.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], port: int, log_file: Path) -> None:
        self.command = [*command, "--host", HOST, "--port", str(port)]
        self.environment, self.port, self.log_file = dict(environment), port, log_file
        self.url = f"http://{HOST}:{port}"
        self._guard: subprocess.Popen[bytes] | None = None
        self._session: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self, timeout: float = 600.0) -> None:
        """Start, and wait for at most `timeout` seconds until `/health` answers.

        Raises:
            ServerFailed: the port is in use (nothing was started), the server ended, or the time is over.
        """
        self._require_free_port()
        try:
            self._launch()
            deadline = time.monotonic() + timeout
            while not self._healthy():
                self.require_alive("in start-up")
                if time.monotonic() > deadline:
                    raise ServerFailed(
                        f"the server did not answer within {timeout:.0f} s, its log ends: {self._last_words()}"
                    )
                time.sleep(POLL_SECONDS)
            # Between the look at the port and now another server may have taken it and answered.
            self.require_alive("in start-up")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to every process that is left after a grace time. May be called again."""
        process, self._guard = self._guard, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS + guard.KILL_SECONDS)
        finally:
            # Also after Ctrl-C while waiting: no more patience.
            process.kill()
            process.wait()
            process.stdout.close()
            if self._session is not None:  # for a guard that was itself killed
                guard.kill(self._session)
            self._session = None

    def alive(self) -> bool:
        """Whether the process that was started is still there."""
        return self._guard is not None and self._guard.poll() is None

    def require_alive(self, when: str) -> None:
        """Raises `ServerFailed` with the log's last words where the server has ended; `when` is for the message."""
        if not self.alive():
            raise ServerFailed(f"the server ended {when}: {self._last_words()}")

    def processes(self) -> list[psutil.Process]:
        """All its processes that run: those of its session."""
        return [] if self._session is None else guard.living(self._session)

    def cpu_seconds(self) -> float:
        """CPU time of its processes so far, with that of children they have waited for. Differences count."""
        seconds = 0.0
        for process in self.processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
        return seconds

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes and the plugin's resident pages.

        Raises:
            ServerFailed: it was refused for half a minute, as it is while requests run, or there is no such endpoint.
        """
        problem, deadline = "", time.monotonic() + RESET_SECONDS
        while time.monotonic() < deadline:
            try:
                answer = json.loads(get(f"{self.url}/reset_prefix_cache?reset_external=true", body={}))
                if answer["success"]:
                    return
                problem = "pages are still in use"
            except urllib.error.HTTPError as error:
                raise ServerFailed(f"the prefix cache could not be emptied: {error}") from None
            except OSError as error:
                problem = str(error)
            self.require_alive("while its prefix cache was to be emptied")
            time.sleep(POLL_SECONDS)
        raise ServerFailed(f"the prefix cache could not be emptied: {problem}")

    def steps(self) -> list[Step]:
        """The engine's steps since the start; none where the log does not tell."""
        found = [tuple(map(float, match)) for match in STEP.findall(self.log_file.read_bytes())]
        return [
            Step(round(context + generation), round(prompt + new), milliseconds / 1000)
            for context, prompt, generation, new, milliseconds in found
        ]

    def _require_free_port(self) -> None:
        with socket.socket() as probe:
            # Connections that were closed a moment ago do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, self.port))
            except OSError as error:
                raise ServerFailed(f"port {self.port} cannot be used: {error.strerror}; choose another one") from None

    def _launch(self) -> None:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        prefix = [sys.executable, "-P", guard.__file__, str(GRACE_SECONDS)]
        with self.log_file.open("wb") as log:
            self._guard = subprocess.Popen(
                [*prefix, *self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
                start_new_session=True,  # Ctrl-C in the terminal is for us, who then end the server in order
            )
        assert self._guard.stdout is not None
        line = self._guard.stdout.readline()
        if not line:
            self._guard.wait()
            raise ServerFailed(f"the server could not be started: {self._last_words()}")
        self._session = int(line)

    def _healthy(self) -> bool:
        with suppress(OSError):
            get(f"{self.url}/health", timeout=5.0)
            return True
        return False

    def _log_lines(self) -> list[str]:
        text = self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""
        return [line.strip() for line in text.splitlines() if line.strip()]

    def _last_words(self) -> str:
        """The errors in the log, or its last lines where it names none, and where it is."""
        lines = self._log_lines()
        reasons = dict.fromkeys(match[1] for line in lines if (match := REASON.search(line)))
        # Errors that follow from the first one often only point at it.
        first, *others = reasons or [None]
        words = [first, *others[1 - LOG_LINES :]] if first else lines[-LOG_LINES:] or ["nothing was logged"]
        return f"{' | '.join(words)} (log: {self.log_file})"
