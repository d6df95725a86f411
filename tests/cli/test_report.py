"""`jointkv report plots` as a command."""

import json
from pathlib import Path

from tests.cli.commands import run

RESULT = {
    "format": "jointkv.calibration/1",
    "rows": [
        {
            "traffic": "names",
            "target": "kl=0.005",
            "seed": 0,
            "max_relative_error": [0.2],
            "predicted": {"ratio": 2.1, "low": 1.9, "high": 2.3},
            "held_out": {"ratio": 2.0, "kl": 0.001, "kl_worst_request": 0.002},
            "met": True,
            "seconds": 200.0,
        }
    ],
}


def test_plots(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps(RESULT))
    output = tmp_path / "plots"
    code, _, err = run("report", "plots", str(result), "--output", str(output))
    assert code == 0, err
    written = [output / "predicted_against_measured.png", output / "predicted_against_measured.md"]
    assert err.splitlines() == [f"wrote {path}" for path in written]
    assert all(path.is_file() for path in written)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps({**RESULT, "format": "other/1"}))
    code, out, err = run("report", "plots", str(result), "--output", str(tmp_path / "plots"))
    assert code == 2 and not out
    assert err.startswith(f"error: {result}: ") and len(err.splitlines()) == 1
    assert not (tmp_path / "plots").exists()


def test_results_must_be_given() -> None:
    code, _, err = run("report", "plots")
    assert code == 2 and "RESULT.json" in err
