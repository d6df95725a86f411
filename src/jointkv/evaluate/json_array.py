"""The items of one large JSON array, one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

CHARACTERS = 1 << 20
"""Read at a time."""
LONGEST = 1 << 26
"""Characters of an item."""
_BLANKS = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Broken:
    """What stands where an item should be, and all behind it."""

    reason: str


def array_items(file: TextIO) -> Iterator[Any]:
    """The items of the array in `file`; what was read before a fault has been given.

    Raises:
        ValueError: it is no JSON, half of one, or an item has more than `LONGEST` characters.
        RecursionError: an item is too deep for Python.
    """
    window, decoder, first = _Window(file), json.JSONDecoder(), True
    window.expect("[")
    while window.next_sign() != "]":
        if not first:
            window.expect(",")
        first = False
        window.next_sign()
        yield window.item(decoder)
    window.expect("]")
    if window.next_sign(end=True):
        raise ValueError(f"something behind the array: {window.next_sign()!r}")


class _Window:
    """The part of a file that is being read."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at = file, "", 0

    def next_sign(self, end: bool = False) -> str:
        """The next sign that is no blank; with `end` there may be none."""
        while True:
            found = _BLANKS.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(CHARACTERS):
                if end:
                    return ""
                raise ValueError("the array has no end")

    def expect(self, sign: str) -> None:
        """Go behind `sign`, which is next."""
        if self.next_sign() != sign:
            raise ValueError(f"{sign!r} expected, found {self.next_sign()!r}")
        self._at += 1

    def item(self, decoder: json.JSONDecoder) -> Any:
        """Go behind the next item, and return it."""
        while True:
            try:
                item, end = decoder.raw_decode(self._text, self._at)
                # What ends where the window ends may go on behind it.
                if end < len(self._text) or not self._more(CHARACTERS):
                    self._at = end
                    return item
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > LONGEST:
                    raise ValueError(f"an item of more than {LONGEST:,} characters") from None
                if not self._more(max(CHARACTERS, len(self._text) - self._at)):
                    raise ValueError(error.msg) from None

    def _more(self, characters: int) -> bool:
        more = self._file.read(characters)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)
