"""The site builds without a warning and loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from tests.docs.doc_pages import ROOT

DRAWINGS = sorted((ROOT / "docs" / "drawings").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs jointkv[docs]")
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: it keeps warnings from --strict.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= {page.stem for page in pages}
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?([^\s\">]+)", page.read_text())
        assert loaded and not [address for address in loaded if re.match(r"(https?:)?//", address)], page


def test_needs_are_shown(site: Path) -> None:
    assert "needs vLLM (make setup-vllm)" in (site / "quickstart.html").read_text()


def test_every_page_is_in_the_menu() -> None:
    listed = re.search(r"^nav:\n((?:  - .*\n)+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert listed is not None
    pages = [str(page) for page in yaml.safe_load(listed[1])]
    assert sorted(pages) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_every_page_is_on_the_first_one() -> None:
    first = (ROOT / "docs" / "index.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert not [page for page in pages if f"]({page}) | " not in first]


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda path: path.name)
def test_drawings(drawing: Path) -> None:
    """Well-formed, described, self-contained, and used."""
    root = ElementTree.parse(drawing).getroot()
    assert root.tag == f"{SVG}svg" and root.findtext(f"{SVG}title") and root.findtext(f"{SVG}desc")
    text = drawing.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "http" not in text and "<script" not in text and "<image" not in text
    assert any(f"drawings/{drawing.name}" in page.read_text() for page in (ROOT / "docs").glob("*.md"))
