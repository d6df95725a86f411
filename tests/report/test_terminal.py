"""A terminal as a picture: what it shows, that it needs no network, and that the committed one is the result's."""

import re
from xml.etree import ElementTree

from jointkv.evaluate.compare.result import Demo
from jointkv.report.pictures.demo import markdown
from jointkv.report.terminal import recording
from tests.docs.doc_pages import ROOT

FOLDER = ROOT / "docs" / "results" / "demo"


def shown(svg: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", svg).replace("&#160;", " ").split())


def test_it_shows_the_command_and_what_it_printed() -> None:
    svg = recording("jointkv demo", "| policy | ratio |\n| --- | ---: |\n| safe | 3.03 |\n")
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    for text in ("$ jointkv demo", "policy", "safe", "3.03"):
        assert text in shown(svg)
    assert set(re.findall(r"https?://[^\s\"<]+", svg)) <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}


def test_the_committed_picture_is_that_of_the_committed_result() -> None:
    """Else `make results` writes it anew."""
    result = Demo.model_validate_json((FOLDER / "demo.json").read_text())
    assert recording("jointkv demo --full", markdown(result.rows)) == (FOLDER / "demo.svg").read_text()
