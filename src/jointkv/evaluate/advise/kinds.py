"""What it is that differs between two prompts, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
_DATE = (
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}"
    rf"|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?|\d{{1,2}} {_MONTH}(?: \d{{4}})?"
)
_TIME = r"\d{1,2}:\d{2}(?::\d{2})?(?:[.,]\d+)?(?: ?[AaPp][Mm])?(?:Z| ?UTC| ?GMT|[+-]\d{2}:?\d{2})?"
_DAY = r"(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?"
_WORD = r"[^\W\d_][\w'.-]*"
PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("uuid", re.compile(r"\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")),
    ("clock", re.compile(rf"(?:{_DAY},? )?(?:(?:{_DATE}),?(?:T| at | )?)?{_TIME}")),
    ("date", re.compile(rf"(?:{_DAY},? )?(?:{_DATE})|\b{_DAY}\b")),
    ("number", re.compile(r"(?<![\w])\d+(?:\.\d+)?(?![\w])")),
    ("id", re.compile(r"(?=[\w+/=-]*\d)(?=[\w+/=-]*[A-Za-z])[\w+/=-]{6,}|\b[0-9a-fA-F]{8,}\b")),
    ("name", re.compile(rf"\b(?=[A-ZÀ-Þ]){_WORD}(?: (?=[A-ZÀ-Þ]){_WORD})*")),
)
THOUGHT = re.compile(
    r"<\|?(?:think|thinking|thought|reasoning|analysis)\b|\[THINK\]|<\|channel\|>analysis", re.IGNORECASE
)
TOOL = re.compile(r"\"(?:parameters|input_schema|function|description)\"\s*:")
MOVE = "move it behind everything that is the same in other requests, best into the last message"
ADVICE = {
    "number": MOVE,
    "id": MOVE,
    "uuid": MOVE,
    "clock": f"{MOVE}; or give the model a tool that tells the time",
    "date": f"{MOVE}; or change it once a day for all",
    "name": MOVE,
    "tools": "send the tools in one order, sorted by name",
    "order": "send the parts in one order, those first that are in most requests",
    "thought": "leave the thoughts of earlier turns in the history as they were first sent, or never send any",
    "text": "send first what is the same in most requests, and what differs behind it",
    "blocks": "the log has no text, only hashes of blocks: look at what stands there in the prompts themselves",
}
ANYWHERE = ("tools", "order", "thought")
"""Kinds that are one fault wherever they stand."""
BEFORE, BEHIND = 64, 64
"""Tokens that are looked at before the first that differs, and from there on."""
LONGEST = 64
"""Characters on either side of the difference that are one thing with it."""
SHOWN = 48
"""Characters of an example."""


@dataclass(frozen=True)
class Difference:
    """What differs in one place.

    Attributes:
        kind: a key of `ADVICE`.
        token: where it begins.
        length: digits of a number, else 0.
        anchor: what stands before it, with digits as `#`.
        ours, theirs: what it is in both.
    """

    kind: str
    token: int
    length: int
    anchor: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class Sides:
    """Two prompts as text around their first difference, both from the same place on."""

    ours: str
    theirs: str

    @property
    def differ(self) -> int:
        """Index of the first character that differs."""
        pairs = zip(self.ours, self.theirs, strict=False)
        return next(
            (at for at, (mine, other) in enumerate(pairs) if mine != other), min(len(self.ours), len(self.theirs))
        )


def difference(sides: Sides, place: Callable[[int], int], reordered: bool) -> Difference:
    """What differs between the two.

    Args:
        place: token of ours at an index of its text.
        reordered: whether what is in one of the places is elsewhere in the other prompt.
    """
    at = sides.differ
    start, kind, length = at, "text", 0
    ours, theirs = sides.ours[at : at + SHOWN], sides.theirs[at : at + SHOWN]
    if _thought(sides.ours, at) != _thought(sides.theirs, at):
        kind = "thought"
    elif reordered:
        kind = "tools" if TOOL.search(sides.ours[: at + 400]) and TOOL.search(sides.theirs[at : at + 400]) else "order"
    else:
        for name, pattern in PATTERNS:
            mine, other = _covering(pattern, sides.ours, at), _covering(pattern, sides.theirs, at)
            if mine and other and (mine.start() == other.start() or name in ("clock", "date")):
                kind, start = name, min(mine.start(), other.start())
                ours, theirs = mine[0], other[0]
                length = sum(sign.isdigit() for sign in ours) if name == "number" else 0
                break
    anchor = re.sub(r"\d", "#", sides.ours[max(0, start - SHOWN) : start]).lstrip()
    return Difference(kind, place(start), length, anchor, ours[:SHOWN], theirs[:SHOWN])


def described(kind: str, shortest: int, longest: int) -> str:
    """The kind in words; of a number with its digits."""
    digits = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
    article = "an" if digits.startswith("8") or digits in ("11", "18") else "a"
    return {
        "number": f"a number of {digits} digits" if shortest != longest else f"{article} {digits}-digit number",
        "id": "an id",
        "uuid": "an id (UUID)",
        "clock": "a clock",
        "date": "a date",
        "name": "a name",
        "tools": "tools in another order",
        "order": "parts in another order",
        "thought": "a thought stripped",
        "text": "other text",
        "blocks": "another block",
    }[kind]


def _covering(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str] | None:
    """What of `text` matches and holds the character `at`, or ends just before it."""
    around = pattern.finditer(text, max(0, at - LONGEST), at + LONGEST)
    return next((found for found in around if found.start() <= at <= found.end()), None)


def _thought(text: str, at: int) -> bool:
    """Whether a thought begins at or just around the character `at`."""
    return THOUGHT.search(text, max(0, at - 12), at + 24) is not None
