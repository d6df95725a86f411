"""The kinds of rows, and checked access to the fields they are made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jointkv.errors import BadInput
from jointkv.evaluate.traffic.jsonl import check_text

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Row:
    """A prompt as it is sent, and the answers that count as right: none where the data set has none."""

    prompt: str
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """What a model reads before it writes the answer, without a template of its own."""
        return self.prompt


@dataclass(frozen=True)
class QuestionRow(Row):
    """A question with a worked answer; `final` is its result, for comparison."""

    final: str

    @property
    def text(self) -> str:
        return f"Question: {self.prompt}\nAnswer:"


@dataclass(frozen=True)
class ChoiceRow(Row):
    """A question with choices; `correct` is the index of the right one and `answers` holds its letter."""

    choices: tuple[str, ...]
    correct: int
    subject: str

    @property
    def text(self) -> str:
        lines = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return "\n".join((self.prompt, *lines, "Answer:"))


@dataclass(frozen=True)
class Turn:
    """One message of a dialogue; `speaker` is `User` or `Assistant`."""

    speaker: str
    text: str


@dataclass(frozen=True)
class DialogueRow(Row):
    """A dialogue: `earlier` turns, then the user's `prompt`, then the reply in `answers`."""

    earlier: tuple[Turn, ...] = ()

    @property
    def text(self) -> str:
        turns = (*self.earlier, Turn("User", self.prompt))
        return "\n".join((*(f"{turn.speaker}: {turn.text}" for turn in turns), "Assistant:"))


def text_field(record: Mapping[str, Any], field: str, where: str) -> str:
    """The non-empty string in `record[field]`. Raises `BadInput` that starts with `where`."""
    return check_text(_field(record, field, where), f"{where}: {field!r}")


def list_field(record: Mapping[str, Any], field: str, where: str) -> list[Any]:
    """The non-empty list in `record[field]`. Raises `BadInput` that starts with `where`."""
    value = _field(record, field, where)
    if not isinstance(value, list) or not value:
        raise BadInput(f"{where}: {field!r} must be an array with at least one item")
    return value


def texts_field(record: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    """The non-empty list of strings in `record[field]`. Raises `BadInput` that starts with `where`."""
    values = list_field(record, field, where)
    return tuple(check_text(value, f"{where}: {field!r}, item {index}") for index, value in enumerate(values))


def message_text(messages: list[Any], index: int, field: str, where: str) -> str:
    """The string `messages[index][field]`. Raises `BadInput` that starts with `where`."""
    if index >= len(messages) or not isinstance(messages[index], Mapping):
        raise BadInput(f"{where}: message {index} is missing or no object")
    return text_field(messages[index], field, f"{where}: message {index}")


def _field(record: Mapping[str, Any], field: str, where: str) -> object:
    if record.get(field) is None:
        raise BadInput(f"{where}: no {field!r}; found: {', '.join(map(repr, record)) or 'no field'}")
    return record[field]
