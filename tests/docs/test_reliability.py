"""The tables of the hazards are those of the committed runs."""

from tests import hazards

NAMES = (
    "directions",
    "runs",
    "core",
    "vllm",
    "vllm_nightly",
    "fuzz",
    "fuzz_again",
    "fuzz_stores",
    "soak",
    "soak_exact",
    "prefill",
)
FILES = [hazards.FOLDER / f"{name}.json" for name in NAMES]


def test_the_tables_are_those_of_the_committed_runs() -> None:
    assert hazards.tables(FILES) == (hazards.FOLDER / "hazards.md").read_text(encoding="utf-8")
    assert hazards.what_runs_where(FILES) == (hazards.FOLDER / "runs.md").read_text(encoding="utf-8")


def test_no_committed_run_has_failed() -> None:
    table = hazards.tables(FILES).removeprefix(hazards.HEAD)
    assert "failed" not in table + hazards.what_runs_where(FILES) and "passed" in table and "| 0 violations" in table
