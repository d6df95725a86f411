"""Markdown tables of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

NOT_MEASURED = "-"
T = TypeVar("T")
Columns = Mapping[str, Callable[[T], str]]
"""Headings, and how a cell is written."""


def number(value: float | None, form: str, low: float | None = None, high: float | None = None) -> str:
    """`value` in a format such as `.2f`, with its interval if known; or the mark of what was not measured."""
    if value is None:
        return NOT_MEASURED
    return format(value, form) + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")


def beside(value: float | None, unfused: float | None, form: str) -> str:
    """`value` with that of the unfused model in brackets."""
    return number(value, form) + ("" if unfused is None else f" ({unfused:{form}})")


def words(name: str) -> str:
    """A name in code, such as that of traffic, as text has it."""
    return name.replace("_", "-")


def table(text: Columns[T], numbers: Columns[T], rows: Iterable[T]) -> str:
    """A table with columns of text, flushed left, then columns of numbers; equal lines are written once."""
    columns = {**text, **numbers}
    rule = ["---"] * len(text) + ["---:"] * len(numbers)
    lines = dict.fromkeys(tuple(_cell(write(row)) for write in columns.values()) for row in rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rule, *lines))


def _cell(text: str) -> str:
    """`text` as one line that does not end its cell."""
    return " ".join(text.split()).replace("|", "\\|")
