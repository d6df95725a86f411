"""Items of an array come one by one, whatever the borders of what is read at a time."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.evaluate import json_array
from jointkv.evaluate.json_array import array_items

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(autouse=True, scope="module")
def short_reads() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "CHARACTERS", 3)
        yield


@settings(max_examples=40)
@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_any_array_comes_back(items: list[Any], indent: int | None, ascii_only: bool) -> None:
    text = f" \n{json.dumps(items, indent=indent, ensure_ascii=ascii_only)}\n "
    assert list(array_items(io.StringIO(text))) == items


@pytest.mark.parametrize(
    ("text", "before", "reason"),
    [
        ('[{"a": 1}, {"a', [{"a": 1}], "Unterminated string"),
        ('[{"a": 1}', [{"a": 1}], "the array has no end"),
        ("[1 2]", [1], "',' expected, found '2'"),
        ("[1, ]", [1], "Expecting value"),
        ("[1] 2", [1], "something behind the array: '2'"),
        ("[", [], "the array has no end"),
    ],
)
def test_what_is_right_comes_before_the_fault(text: str, before: list[Any], reason: str) -> None:
    found = array_items(io.StringIO(text))
    assert [next(found) for _ in before] == before
    with pytest.raises(ValueError, match=reason):
        next(found)


def test_an_item_without_an_end_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "LONGEST", 50)
    endless = io.StringIO('["' + "a" * 1000)
    with pytest.raises(ValueError, match="more than 50 characters"):
        list(array_items(endless))
    assert endless.tell() < 250
