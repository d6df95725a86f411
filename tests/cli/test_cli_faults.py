"""Commands on a full disk and under SIGTERM: what was computed is not lost, nothing half done is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jointkv.cli import console
from jointkv.errors import BadInput
from jointkv.evaluate.calibrate.store import Store
from jointkv.evaluate.holding import prefilled
from jointkv.policy.profile import Profile
from tests.cli.commands import run
from tests.cli.test_calibrate import command
from tests.system.test_file_faults import full_disk

FULL = pytest.mark.hazard(
    "Faults",
    "a full disk at the end of a long computation",
    "the result is printed instead; one line names the file and the reason; exit code 2",
)


@FULL
def test_a_result_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    path.write_text("precious")
    with full_disk(), pytest.raises(BadInput, match=r"result.json: File too large; it was printed instead"):
        console.write_json(path, {"computed": list(range(99))})
    assert json.loads(capsys.readouterr().out)["computed"][-1] == 98 and path.read_text() == "precious"


@FULL
def test_a_profile_that_cannot_be_written_is_printed(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = command(tiny, tmp_path)
    (tmp_path / "p.json").write_text("precious")
    monkeypatch.setattr(Store, "keep", lambda *_: None)
    monkeypatch.setattr(prefilled, "save", lambda *_: None)
    with full_disk():
        code, out, err = run(*options)
    assert code == 2 and "p.json: File too large; it was printed instead" in " ".join(err.split())
    assert Profile.model_validate_json(out).met
    assert (tmp_path / "p.json").read_text() == "precious"


@pytest.mark.hazard(
    "Faults",
    "a full disk in the middle of a calibration",
    "one line names the file and the reason; exit code 2; what was kept before is used when it is run again",
)
def test_a_calibration_on_a_full_disk(tiny: str, tmp_path: Path) -> None:
    """Once a traceback of the library that writes tensors."""
    options = command(tiny, tmp_path)
    with full_disk(4096):
        code, _, err = run(*options)
    line = " ".join(err.splitlines()[-1].split())
    assert code == 2 and line.startswith("error: cannot write") and "File too large" in line and ".work/" in line
    assert not (tmp_path / "p.json").exists() and not list((tmp_path / "p.json.work").glob(".*"))
    assert run(*options)[0] == 0 and Profile.load(tmp_path / "p.json").met


@pytest.mark.hazard(
    "Faults",
    "SIGTERM to `jointkv calibrate`, while it starts or computes",
    "it ends with a code other than 0, without a profile or anything half written; the same command goes on",
)
@pytest.mark.parametrize("phase", ["starting", "computing"])
def test_sigterm_to_a_calibration(tiny: str, tmp_path: Path, phase: str) -> None:
    options, work = command(tiny, tmp_path, tokens=60), tmp_path / "p.json.work"
    words = [str(Path(sys.executable).parent / "jointkv"), *map(str, options)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while phase == "computing" and not list(work.glob("*")) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        # Python itself dies of the signal before the command has begun.
        early = {-signal.SIGTERM} if phase == "starting" else set()
        assert process.wait(60) in {128 + signal.SIGTERM, *early}
    assert not (tmp_path / "p.json").exists() and not list(tmp_path.rglob("*.tmp-*"))
    if phase == "computing":
        assert run(*options)[0] == 0 and Profile.load(tmp_path / "p.json").met
