"""Markdown tables of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NOT_MEASURED = "-"


def number(value: float | None, form: str) -> str:
    """`value` in a format such as `.2f`, or the mark of what was not measured."""
    return NOT_MEASURED if value is None else format(value, form)


def yes(value: bool) -> str:
    """`value` as a word."""
    return "yes" if value else "no"


def table(words: Sequence[str], numbers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with columns of words, flushed left, then columns of numbers; equal lines are written once."""
    headings = [*words, *numbers]
    rule = ["---"] * len(words) + ["---:"] * len(numbers)
    written = dict.fromkeys(tuple(map(cell, line)) for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in (headings, rule, *written))


def cell(text: str) -> str:
    """`text` as one line that does not end its cell."""
    return " ".join(text.split()).replace("|", "\\|")
