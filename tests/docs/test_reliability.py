"""The tables of the hazards are those of the committed runs."""

from tests import hazards
from tests.docs.doc_pages import ROOT

NAMES = ("core", "vllm", "vllm_nightly", "fuzz", "fuzz_again", "soak", "soak_exact")
FILES = [ROOT / "docs" / "results" / "reliability" / f"{name}.json" for name in NAMES]


def test_the_tables_are_those_of_the_committed_runs() -> None:
    assert hazards.tables(FILES) == hazards.PAGE.read_text(encoding="utf-8")


def test_no_committed_run_has_failed() -> None:
    table = hazards.tables(FILES).removeprefix(hazards.HEAD)
    assert "failed" not in table and "passed" in table and "| 0 violations" in table
