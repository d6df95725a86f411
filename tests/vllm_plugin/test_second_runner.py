"""vLLM's second model runner, which it takes on GPUs by default, in real engines without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from tests.hazards import SECOND, SECOND_AHEAD, runs

SCRIPT = Path(__file__).with_name("second_runner.py")
HAZARD = pytest.mark.hazard(
    "State",
    "vLLM's second model runner, or a scheduler that is a step ahead, reads a page that is another's by now",
    "tables of scheduler and worker are equal in every step, answers at bound 0 are stock's, all pages come back",
)


def play(folder: Path, *names: str, **environment: str) -> dict[str, dict[str, Any]]:
    """What `second_runner.py` found in each case."""
    command = [sys.executable, SCRIPT, folder, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    cases = {case.pop("case"): case for case in said}
    assert cases.keys() == set(names), done.stderr[-4000:]
    for case in cases.values():
        assert case.get("runner", "V2Tables") == "V2Tables" and case.get("faults", 0) == 0
    return cases


def both(*names: str) -> list[str]:
    """Each as it is and with a scheduler that is a step ahead."""
    return [*names, *(f"{name}, asynchronous" for name in names)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All in one process: to import vLLM takes longer than to serve a case."""
    together = ["stock", "off", "warmed up", "equal, asynchronous", "stock, crowd", "crowd, drafts"]
    together += ["stored", *both("loaded"), "prefix stored", *both("behind it")]
    return play(
        tmp_path_factory.mktemp("second"),
        *together,
        "moved",
        "moved, asynchronous",
        *both("in place", "crowd", "reuse", "norms", "directions"),
    )


def everywhere(what: str) -> Any:
    """With the second runner, as it is and a step ahead."""

    def decorate(test: Any) -> Any:
        for mark in runs(what, SECOND, SECOND_AHEAD):
            test = mark(test)
        return test

    return decorate


@HAZARD
@everywhere("fusion")
def test_bound_zero_changes_no_token_after_a_warm_up_and_a_step_ahead(found: Any) -> None:
    for name in ("off", "warmed up", "equal, asynchronous"):
        assert found[name]["tokens"] == found["stock"]["tokens"]
        assert (found[name]["blocks_merged"] > 0) == (name != "off")
    assert found["warmed up"]["checks"] == found["warmed up"]["steps"]


@HAZARD
@everywhere("fusion")
@pytest.mark.runs("drafts by ngram", *SECOND)
def test_preempted_and_aborted_requests_leave_tables_and_answers_right(found: Any) -> None:
    for name in [*both("crowd"), "crowd, drafts"]:
        assert found[name]["tokens"] == found["stock, crowd"]["tokens"]
        assert found[name]["preempted"] > 0 and found[name]["blocks_merged"] > 0
    assert found["crowd, drafts"]["drafted"] > 0


@HAZARD
@everywhere("reuse")
def test_resident_text_is_not_computed(found: Any) -> None:
    assert all(found[name]["prompt_tokens_skipped"] > 0 for name in both("reuse"))


@HAZARD
@everywhere("text that moved")
def test_text_behind_headers_of_other_lengths_is_not_computed(found: Any) -> None:
    for name in both("moved"):
        assert found[name]["moved_tokens_skipped"] == 32 * found[name]["pages_filled"] > 0


@HAZARD
@everywhere("text read in place")
def test_text_behind_headers_of_other_lengths_is_read_where_it_is(found: Any) -> None:
    for name in both("in place"):
        assert found[name]["moved_tokens_skipped"] == 32 * found[name]["blocks_in_place"] > 0
        assert found[name]["pages_filled"] == 0 and found[name]["tokens"] == found["moved"]["tokens"]


@HAZARD
@everywhere("own norms")
def test_blocks_keep_their_norms_and_shared_pages_are_read_once(found: Any) -> None:
    for case in (found[name] for name in both("norms")):
        fault, steps, shared = case["attention"]
        assert fault is None and 0 < steps == shared and case["factors"] > 0


@HAZARD
@everywhere("written directions")
def test_directions_are_written_and_read_with_own_norms(found: Any) -> None:
    for case in (found[name] for name in both("directions")):
        fault, steps, shared = case["attention"]
        assert fault is None and 0 < steps == shared and case["factors"] > 0
        assert case["blocks_merged_by_direction"] == case["pages_freed"] + case["directions_written"] > 0


@pytest.mark.slow
@HAZARD
@pytest.mark.parametrize("name", [*both("crowd, two groups", "anything", "anything, reuse"), "norms, drafts"])
def test_anything_may_happen(name: str, tmp_path: Path) -> None:
    (case,) = play(tmp_path, name, JOINTKV_TEST_EVENTS="200").values()
    assert case["blocks_merged"] > 0 and (case["preempted"] > 0 or name == "norms, drafts")
    assert (case["drafted"] > 0) == ("drafts" in name)
    if name.startswith("anything"):
        assert case["answered"] > 0 and not case["short"] and not case["private"]
        assert ("reuse" in name) == (case["prompt_tokens_skipped"] > 0)


@everywhere("stored pages")
def test_a_second_engine_loads_what_the_first_has_computed(found: Any) -> None:
    for name in ("stored", *both("loaded")):
        assert found[name]["tokens"] == found["stock"]["tokens"]
        assert found[name]["store_tokens_loaded"] == (0 if name == "stored" else 3 * 64), "of two equal ones one loads"


@everywhere("reuse behind stored pages")
def test_text_is_reused_behind_what_is_loaded(found: Any) -> None:
    counted = [(found[name]["store_tokens_loaded"], found[name]["prompt_tokens_skipped"]) for name in both("behind it")]
    assert counted == [(64, 4 * 32), (7 * 32 + 3 * 32, 3 * 32)], "the second time what the first has stored is loaded"
