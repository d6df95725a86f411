"""MMLU: multiple-choice questions on 57 subjects."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from jointkv.errors import BadInput
from jointkv.evaluate.datasets.base import Dataset, Local
from jointkv.evaluate.datasets.hub import Hub
from jointkv.evaluate.datasets.rows import LETTERS, ChoiceRow, Record
from jointkv.evaluate.jsonl import Text, located
from jointkv.system.files import reason

SPLITS = ("dev", "test")


class _Question(Record):
    """`answer` is an index into the choices."""

    question: Text
    subject: Text
    choices: Annotated[tuple[str, ...], Field(min_length=1, max_length=len(LETTERS))]
    answer: Annotated[int, Field(ge=0)]

    def row(self) -> ChoiceRow:
        if self.answer >= len(self.choices):
            raise BadInput(f"'answer' must be an index into {len(self.choices)} choices")
        return ChoiceRow(self.question, (LETTERS[self.answer],), self.choices, self.answer, self.subject)


class Mmlu(Dataset):
    """Hendrycks et al., arXiv 2009.03300. Without `subject` all there are: 57 on the hub, fewer in the data folder.

    `split` is `test`, or `dev` for the examples of a few-shot prompt.
    """

    record = _Question

    def __init__(self, subject: str | None = None, split: str = "test") -> None:
        if split not in SPLITS:
            raise BadInput(f"MMLU has the splits {' and '.join(SPLITS)} here, not {split!r}")
        self.subject, self.split = subject, split
        self.name = " ".join(part for part in ("MMLU", subject, split if split != "test" else None) if part)
        self.hub = Hub("cais/mmlu", subject or "all", split)
        file = f"mmlu/{split}/{subject}_{split}.csv" if subject else f"mmlu/{split}"
        self.copy = Local(file, f"MMLU {split}, {subject or 'the subjects in the folder'}")

    def local_rows(self, path: Path) -> Iterator[ChoiceRow]:
        """Rows of CSV without header: question, four choices, letter of the right one."""
        for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
            yield from _read_csv(file, file.name.removesuffix(f"_{self.split}.csv"))


def _read_csv(path: Path, subject: str) -> Iterator[ChoiceRow]:
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            for fields in reader:
                with located(f"{path}:{reader.line_num}"):
                    row = _row(fields, subject)
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: cannot be read: {reason(error)}") from error


def _row(fields: list[str], subject: str) -> ChoiceRow:
    if len(fields) != 6:
        raise BadInput(f"six columns expected (question, A, B, C, D, answer), found {len(fields)}")
    question, *choices, letter = fields
    if not question.strip():
        raise BadInput("the question is empty")
    if letter not in tuple("ABCD"):
        raise BadInput(f"the answer must be A, B, C or D, found {letter!r}")
    return ChoiceRow(question, (letter,), tuple(choices), LETTERS.index(letter), subject)
