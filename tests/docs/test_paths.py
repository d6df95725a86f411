"""Every file and module that the pages name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.doc_pages import PAGES, ROOT, inline_code

SOURCE = ROOT / "src" / "jointkv"
PLACES = (ROOT, SOURCE, ROOT / "tests")
"""Where names begin: SECURITY.md names tests in full, CONTRIBUTING.md files as the source tree has them."""

TEXTS = (*PAGES, *(ROOT / name for name in ("SECURITY.md", "CHANGELOG.md", "deploy/README.md")))
PLACEHOLDER = re.compile(r"NAME|FOLDER|vX_Y")
MADE = "out"
"""The folder that commands write to; it may or may not be there."""

PYTHON_FILES = {path.name for folder in (SOURCE, ROOT / "tests", ROOT / "benchmarks") for path in folder.rglob("*.py")}


def is_there(name: str) -> bool:
    """Whether a path, which may end in a pattern, leads to something."""
    return any(any(place.glob(name)) for place in PLACES)


def missing_paths(code: str) -> list[str]:
    """The words of inline code that name a file of the repository which is not there."""
    found = []
    for word in code.split():
        top, slash, _ = word.partition("/")
        if PLACEHOLDER.search(word) or not re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", word):
            continue
        if top == MADE:
            continue
        if slash and (word.endswith(".py") or any((place / top).is_dir() for place in PLACES)):
            found += [] if is_there(word) else [word]
        elif word.endswith(".py") and word not in PYTHON_FILES:
            found.append(word)
    return found


def missing_modules(text: str) -> list[str]:
    """Dotted names below `jointkv` that are neither a module nor in one. Nothing is imported: some need vLLM."""
    found = []
    for name in re.findall(r"(?<![\w/.'-])jointkv(?:\.\w+)+(?![\w/])", text):
        parts, place = name.split(".")[1:], SOURCE
        while parts and (place / parts[0]).is_dir():
            place /= parts.pop(0)
        if parts and (place / f"{parts[0]}.py").is_file():
            place = place / f"{parts.pop(0)}.py"
        source = (place if place.is_file() else place / "__init__.py").read_text(encoding="utf-8")
        found += [name] * (not all(re.search(rf"\b{part}\b", source) for part in parts))
    return found


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_files_and_modules_exist(page: Path) -> None:
    paths = [missing for code in inline_code(page) for missing in missing_paths(code)]
    assert paths == [] and missing_modules(page.read_text(encoding="utf-8")) == []


def test_what_is_not_there_is_found() -> None:
    assert missing_paths("policy/none.py src/jointkv/none fusion/none.c test_none.py") == [
        *("policy/none.py", "src/jointkv/none", "fusion/none.c", "test_none.py")
    ]
    assert missing_paths("out/demo OWNER/NAME policy/base.py docs/results/bench/*.json test_paths.py --port") == []
    assert missing_modules("jointkv.policy.none, jointkv.none") == ["jointkv.policy.none", "jointkv.none"]
    assert missing_modules("jointkv.policy.base.FusionPolicy jointkv.profile/1 grafana/jointkv.json") == []
