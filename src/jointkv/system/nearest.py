"""What a user may have meant by a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ALIKE = 0.7
"""Share of characters that two names have in common in order: of shorter ones chance makes more alike than meaning."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is most like `name`, whatever the case; None where none is alike."""
    names = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower(), names, 1, ALIKE)
    return names[found[0]] if found else None


def not_known(name: str, known: Iterable[str], also: str = "") -> str:
    """`'NAME'; known: ...` for a message, which asks for the nearest one first if there is one.

    Args:
        also: stands behind the known names.
    """
    known = list(known)
    near = nearest(name, known)
    asked = "; known" if near is None else f"; did you mean {near!r}? Known"
    return f"{name!r}{asked}: {', '.join(known)}{also}"
