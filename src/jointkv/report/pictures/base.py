"""What every picture is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from matplotlib.figure import Figure
from pydantic import BaseModel

from jointkv.evaluate.paper.result import FusedRow
from jointkv.evaluate.tasks.result import TaskRow
from jointkv.report.markdown import Columns, table

R = TypeVar("R", bound=BaseModel)


class Picture(ABC, Generic[R]):
    """One picture and the table beside it, from all results of one format.

    Attributes:
        name: of its files, without suffix.
        reads: the format it is drawn from.
        about: what the numbers in the table are.
        text, numbers: columns of the table, of a row.
    """

    name: ClassVar[str]
    reads: type[R]
    about: ClassVar[str] = ""
    text: ClassVar[Columns[Any]] = {}
    numbers: ClassVar[Columns[Any]] = {}

    @abstractmethod
    def rows(self, results: Sequence[R]) -> Sequence[Any]:
        """What the picture and its table show; empty where `results` have nothing for them."""

    @abstractmethod
    def draw(self, results: Sequence[R]) -> Figure | None:
        """The picture of `results`, which have rows; None if only the table has something."""

    def table(self, results: Sequence[R]) -> str:
        """The same numbers as Markdown, with a line above that says what they are."""
        return f"{self.about}\n\n{table(self.text, self.numbers, self.rows(results))}"

    def conditions(self, result: R) -> Mapping[str, object]:
        """What must not differ, by name, between results that share the picture."""
        return {}


def source(row: FusedRow | TaskRow) -> str:
    """Where the data of a row comes from, and whether it stands in for other data."""
    return f"{row.source}{' (stand-in)' if row.stand_in else ''}"
