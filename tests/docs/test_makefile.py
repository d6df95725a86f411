"""What a newcomer sees of `make`: what is installed and for how long, no warnings about pip, a small first look."""

from __future__ import annotations

import re

import pytest

from tests.docs.doc_pages import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
ENVIRONMENTS = ["$(VENV)/.ready", "$(VLLM_VENV)/.ready", "$(EVAL_VENV)/.ready"]


def recipe(target: str) -> list[str]:
    found = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert found is not None, target
    return [line.strip() for line in found[1].splitlines()]


@pytest.mark.parametrize("target", ENVIRONMENTS)
def test_an_installation_says_what_it_does_and_nothing_else(target: str) -> None:
    first, *others = recipe(target)
    assert re.match(r'@echo "installing jointkv.* into .*: [\d.]+ GB, \d+ to \d+ minutes"', first)
    pip = [line for line in others if "/pip " in line]
    assert len(pip) >= 3 and all("$(PIP_OPTIONS)" in line for line in pip)
    assert all(line.startswith("@") for line in others), "commands are not printed"


def test_warnings_of_pip_are_left_out_and_errors_are_not() -> None:
    """A second `-q` leaves warnings out, a third one would leave errors out."""
    found = re.search(r"^PIP_OPTIONS := (.*)$", MAKEFILE, re.MULTILINE)
    assert found is not None and set(found[1].split()) == {"-qq", "--disable-pip-version-check"}


def test_these_are_all_that_is_installed() -> None:
    assert MAKEFILE.count("/pip ") == sum(line.count("/pip ") for target in ENVIRONMENTS for line in recipe(target))


def test_the_demo_is_the_small_one() -> None:
    (command,) = recipe("demo")
    assert command.startswith("$(BIN)/jointkv demo") and "--full" not in command
