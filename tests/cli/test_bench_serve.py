"""`jointkv bench serve` as a command, with servers that are none: options, messages, exit codes, Ctrl-C."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jointkv.bench import measure, options, run
from jointkv.bench.options import client_cores, server_cores
from jointkv.bench.result import Arm, Latency, Load, Run, ServingResult, Timeline
from jointkv.bench.server import ServerFailed
from jointkv.cli import bench_serve
from jointkv.system.machine import allowed_cores, core_list
from tests.cli.commands import run as run_jointkv
from tests.cli.commands import save_tiny

REAL_STARTER = run.server_starter
NOTHING = Timeline(seconds=[], running=[], waiting=[], pool_usage=[], preemptions=[])


class Fake:
    """Stands for servers and loads; keeps what it was asked for."""

    def __init__(self) -> None:
        self.plans: list[run.Plan] = []
        self.environments: list[dict[str, str]] = []
        self.requests: list[Any] = []
        self.on_measure = lambda arm: None

    def reset_prefix_cache(self) -> None:
        pass

    def starter(self, plan: run.Plan, environment: dict[str, str], cores: set[int], *rest: Any) -> run.Serve:
        self.plans.append(plan)
        self.environments.append(environment)

        @contextmanager
        def serve(arm: Arm, number: int) -> Iterator["Fake"]:
            if "--die" in arm.flags:
                raise ServerFailed("the server ended in start-up: unrecognized arguments: --die (log: x.log)")
            yield self

        return serve

    def measure(self, server: Any, arm: Arm, load: Load, requests: Any, **given: Any) -> tuple[Run, list[str]]:
        self.on_measure(arm)
        self.requests = list(requests)
        rate = {"stock": 4.0}.get(arm.name, 8.0)
        spread = Latency(mean=1.0, p50=1.0, p95=1.0, p99=1.0)
        made = Run(
            **{"arm": arm.name, "load": load.label, "round": given["round"], "position": given["position"]},
            **{"seconds": 1.0, "completed": 2, "failed": 0, "prompt_tokens": 2, "output_tokens": 2},
            **{"output_tokens_per_s": rate, "total_tokens_per_s": rate, "requests_per_s": rate},
            **{"ttft": spread, "tpot": None, "itl": None, "e2el": spread, "running_peak": 2.0, "running_mean": 1.0},
            **{"waiting_peak": 0.0, "waiting_mean": 0.0, "preemptions": 0, "recomputed_tokens": None},
            **{"pool_usage_peak": 0.5, "pool_usage_mean": 0.5, "pages_freed": None, "plugin_seconds": None},
            **{"kv_bytes_per_running_token": None, "server_cpu_seconds": None, "foreign_cpu": None, "fusion": None},
            **{"timeline": NOTHING, "requests": []},
        )
        return made, ["text"] * len(requests)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(run, "server_starter", made.starter)
    monkeypatch.setattr(measure, "measure", made.measure)
    monkeypatch.setattr(bench_serve, "require", lambda package: None)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"), tokens=4096)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    lines = [{"prompt": f"Tom buys {number} pens.", "timestamp": number, "output_tokens": 3} for number in (2, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def serve(model: str, output: Path, *arguments: str) -> tuple[int, str, str]:
    small = ("--pool-blocks", "400", "--block-size", "16", "--dtype", "float32")
    return run_jointkv("bench", "serve", "--model", model, "--output", str(output), *small, *arguments)


def test_a_whole_comparison(fake: Fake, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/jointkv", "bench", "serve", "--arm", "a b"])
    output = tmp_path / "out"
    code, out, err = serve(model, output, "--requests", "3", "--output-tokens", "5", "--concurrency", "1,2")
    assert code == 0, err
    result = ServingResult.load(output / "serving.json")
    assert result.complete and len(result.runs) == 2 * 2 * 3
    assert result.command == "jointkv bench serve --arm 'a b'"
    assert (result.traffic, result.requests, result.output_tokens) == ("near_prefix", 3, 5)
    assert result.cores["server"] and "torch" in result.versions
    longest = max(request.tokens for request in fake.requests)
    flags = dict(zip(result.common_flags[::2], result.common_flags[1::2], strict=False))
    assert flags["--max-model-len"] == str(longest) and flags["--dtype"] == "float32"
    assert "fused/stock" in out and "2.00 (0.25)" in out and "p is 0.25 at best" in out
    assert f"jointkv report html {output}/serving.json" in err.replace("\n", "")
    assert "round 3 of 3, stock, closed 2" in err
    assert fake.environments[0]["VLLM_CPU_OMP_THREADS_BIND"] == result.cores["server"]

    code, out, err = serve(
        model, output, "--requests", "3", "--output-tokens", "5", "--concurrency", "1,2", "--json", "-"
    )
    assert code == 0 and "has 12 finished runs, which are not repeated" in err
    assert ServingResult.model_validate_json(out) == result
    code, _, err = serve(model, output, "--requests", "4", "--output-tokens", "5", "--concurrency", "1,2")
    assert code == 2 and "other settings (requests, requests_sha256; requests was 3, is 4)" in err and "--fresh" in err
    assert len(list((output / "runs").iterdir())) == 24


def test_replay_and_arms(fake: Fake, model: str, log: Path, tmp_path: Path) -> None:
    arms = ("--arm", "stock", "--arm", "large_pool", "--arm", "tight=fused max_relative_error=0.1 --flag 3")
    code, _, err = serve(
        model, tmp_path / "out", "--replay", str(log), "--speed", "2", *arms, "--repeats", "1", "--set", "scope=both"
    )
    assert code == 0, err
    result = ServingResult.load(tmp_path / "out" / "serving.json")
    assert [load.label for load in result.loads] == ["replay x2"]
    assert [request.timestamp for request in fake.requests] == [0.0, 1.0]
    assert {request.output_tokens for request in fake.requests} == {3}
    tight = result.arm("tight")
    assert tight.fusion == {"scope": "both", "max_relative_error": 0.1} and tight.flags == ["--flag", "3"]
    assert [arm.pool_blocks for arm in result.arms] == [400, 3200, 400]
    largest = 3200 * result.block_bytes
    assert int(fake.environments[0]["VLLM_CPU_KVCACHE_SPACE"]) == max(1, -(-largest // 2**30))


def test_a_server_that_dies_in_start_up_keeps_the_rest(fake: Fake, model: str, log: Path, tmp_path: Path) -> None:
    code, _, err = serve(model, tmp_path, "--replay", str(log), "--arm", "stock", "--arm", "bad=stock --die")
    assert code == bench_serve.FAILED == 1
    assert "arm bad failed in round 1: the server ended in start-up: unrecognized arguments: --die" in err
    partial = ServingResult.load(tmp_path / "serving.json")
    assert not partial.complete and [made.arm for made in partial.runs] == ["stock"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_done(fake: Fake, model: str, log: Path, tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    seen: list[str] = []

    def interrupt(arm: Arm) -> None:
        seen.append(arm.name)
        if len(seen) == 3:
            os.kill(os.getpid(), number)

    fake.on_measure = interrupt
    code, _, err = serve(model, tmp_path, "--replay", str(log))
    assert code == 130 and "interrupted; stopping the server" in err and "the same command goes on" in err
    assert len(ServingResult.load(tmp_path / "serving.json").runs) == 2
    assert signal.getsignal(number) is before
    fake.on_measure = lambda arm: seen.append(arm.name)
    assert serve(model, tmp_path, "--replay", str(log))[0] == 0
    assert seen == ["stock", "fused", "fused", "fused", "stock", "stock", "fused"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arm", "x=stock --dtype half"), "--dtype is set by the benchmark"),
        (("--arm", "x=stock --tokenizer other"), "--tokenizer must be the same in all arms"),
        (("--flags", "--port 1"), "--port is set by the benchmark"),
        (("--flags", "'"), "--flags"),
        (("--traffic", "nonsense"), "unknown traffic"),
        (("--data", "missing.jsonl"), "missing.jsonl: cannot be read"),
        (("--burstiness", "0.3"), "--burstiness needs --rate"),
        (("--block-size", "20"), "multiple of 16"),
        (("--max-batched-tokens", "8"), "max_batched_tokens must be at least max_running"),
        (("--server-cores", "x"), "server_cores: expected numbers"),
        (("--client-cores", "100000"), "client_cores: 100000 is not among the cores to use"),
        (("--server-cores", "100000"), "server_cores: 100000 is not among the cores to use"),
        (("--dtype", "fp4"), "unknown dtype"),
        (("--pool-blocks", "20"), "there are 20"),
        (("--set", "no=1"), "there is no option 'no'"),
    ],
)
def test_bad_input_is_one_line(
    fake: Fake, model: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = serve(model, tmp_path / "out", "--requests", "2", *arguments)
    assert code == 2 and not out
    assert message in err.splitlines()[-1]
    assert not fake.plans and not (tmp_path / "out" / "runs").exists()


def test_data_and_replay_exclude_each_other(fake: Fake, model: str, log: Path, tmp_path: Path) -> None:
    code, _, err = serve(model, tmp_path, "--data", str(log), "--replay", str(log))
    assert code == 2 and "exclude each other" in err


def test_the_last_of_four_cores_is_left_to_the_load_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(allowed: set[int], text: str | None = None) -> tuple[set[int], set[int]]:
        monkeypatch.setattr(options, "allowed_cores", lambda: allowed)
        asked = cast(options.Options, SimpleNamespace(server_cores=text, client_cores=None))
        return server_cores(asked), client_cores(asked)

    assert chosen({0, 1}) == ({0, 1}, {0, 1})
    assert chosen({1, 2, 3, 5}) == ({1, 2, 3}, {5})
    assert chosen({0, 1, 2, 3}, "0-1,3") == ({0, 1, 3}, {2})


def test_real_servers_get_the_flags_of_their_arm(fake: Fake, model: str, log: Path, tmp_path: Path) -> None:
    """What `server_starter` itself does, with a server that only keeps its command."""
    started: list[tuple[list[str], set[int]]] = []

    class Recorder:
        def __init__(self, command: list[str], environment: dict[str, str], port: int, log_file: Path) -> None:
            self.command, self.log_file = command, log_file

        def __enter__(self) -> "Recorder":
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def start(self, timeout: float) -> None:
            started.append((self.command, allowed_cores()))

    serve(model, tmp_path, "--replay", str(log), "--arm", "fp8_fused", "--arm", "own=stock --x 1", "--repeats", "1")
    plan = fake.plans[0]
    core = min(allowed_cores())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Server", Recorder)
        patch.setattr(run, "warm_up", lambda *arguments: None)
        start = REAL_STARTER(plan, {}, {core}, 1, 5.0, tmp_path / "logs")
        for arm in plan.arms:
            with start(arm, 2) as made:
                assert made.log_file == tmp_path / "logs" / f"{arm.name}-2.log"
    (fused, cores), (own, _) = started
    assert cores == {core} != set() and core_list(allowed_cores()) == plan.facts["cores"]["load_generator"]
    assert fused[-4:] == ["--num-gpu-blocks-override", "1600", "--kv-cache-dtype", "fp8"]
    assert own[-4:] == ["--num-gpu-blocks-override", "400", "--x", "1"]
    assert '"options": {}' in " ".join(fused) and '"options": null' in " ".join(own)
    assert own[own.index("--served-model-name") + 1] == plan.model
