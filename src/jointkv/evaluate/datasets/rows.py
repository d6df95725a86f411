"""The kinds of rows, and what every record is that one is made from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pydantic import BaseModel

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


class Record(BaseModel, ABC):
    """The fields of a record that count, as the data set has them."""

    @abstractmethod
    def row(self) -> Row | None:
        """The row in this record; None if the record is of no concern. Raises `BadInput`."""
