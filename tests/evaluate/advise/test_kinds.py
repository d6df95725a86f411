"""What differs between two prompts is called by its name."""

import pytest

from jointkv.evaluate.advise.kinds import ADVICE, Sides, described, difference

PAIRS = (
    ("Request {}, go.", "482910483712", "117364509821", "a 12-digit number"),
    ("Ticket {}\nHello", "7", "81", "a 1-digit number"),
    ("[{}] system", "2026-03-02T09:14:07Z", "2026-03-02T09:14:55Z", "a clock"),
    ("It is {}.", "09:14", "10:02", "a clock"),
    ("Today is {}.", "Monday, March 2", "Tuesday, March 3", "a date"),
    ("Date: {}\n", "2026-03-02", "2026-04-11", "a date"),
    ("trace {} ok", "0f8fad5b-d9cb-469f-a165-70867728950e", "0f8f7c2a-11cb-469f-a165-70867728950e", "an id (UUID)"),
    ("run {}:", "req_8fA2k91bQz", "req_8fZ7710xLm", "an id"),
    ("You help {} today.", "Ada Brown", "Eleanor Smith", "a name"),
    ("Please {} this.", "sort the", "count all", "other text"),
    ("User: hi\nAssistant: {}Paris.", "<think>The capital.</think>\n", "", "a thought stripped"),
)


@pytest.mark.parametrize(("frame", "ours", "theirs", "says"), PAIRS)
def test_kinds(frame: str, ours: str, theirs: str, says: str) -> None:
    for mine, other in ((ours, theirs), (theirs, ours)):
        found = difference(Sides(frame.format(mine), frame.format(other)), lambda index: index, False)
        expected = says if found.kind != "number" else f"a {len(mine)}-digit number"
        assert described(found.kind, found.length, found.length) == expected and found.kind in ADVICE
        if found.kind not in ("text", "thought"):
            assert found.token == frame.index("{") and (found.ours, found.theirs) == (mine, other)
            assert found.anchor == frame.split("{")[0]


def test_what_stands_elsewhere_is_in_another_order() -> None:
    tools = ['{"name": "a", "description": "x"}', '{"name": "b", "description": "y"}']
    one, other = ("\n".join(order) for order in (tools, tools[::-1]))
    assert difference(Sides(one, other), lambda index: index, True).kind == "tools"
    assert difference(Sides("one two", "two one"), lambda index: index, True).kind == "order"


def test_numbers_of_several_lengths() -> None:
    assert described("number", 5, 7) == "a number of 5 to 7 digits"
    assert described("number", 8, 8) == "an 8-digit number"
