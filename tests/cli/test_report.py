"""`jointkv report plots` as a command."""

from pathlib import Path

from tests.cli.commands import run
from tests.report import samples


def test_plots(tmp_path: Path) -> None:
    (result,) = samples.save(tmp_path, result=samples.calibrations())
    output = tmp_path / "plots"
    code, _, err = run("report", "plots", str(result), "--output", str(output))
    assert code == 0, err
    written = [output / "predicted_against_measured.png", output / "predicted_against_measured.md"]
    assert err.splitlines() == [f"wrote {path}" for path in written]
    assert all(path.is_file() for path in written)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (result,) = samples.save(tmp_path, result={**samples.calibrations(), "format": "other/1"})
    code, out, err = run("report", "plots", str(result), "--output", str(tmp_path / "plots"))
    assert code == 2 and not out
    assert err.startswith(f"error: {result}: ") and len(err.splitlines()) == 1
    assert not (tmp_path / "plots").exists()


def test_results_must_be_given() -> None:
    code, _, err = run("report", "plots")
    assert code == 2 and "RESULT.json" in err
