"""What every task is made of: prompts with known answers, and a score from 0 to 1 for what a model made of them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from jointkv.errors import BadInput
from jointkv.evaluate.datasets import Loaded, Row
from jointkv.evaluate.traffic.base import Request, Tokenizer, encode

RowType = TypeVar("RowType", bound=Row)


@dataclass(frozen=True)
class Example:
    """One prompt with its right answers; either the model writes an answer, or it chooses one.

    Attributes:
        request: the prompt; its continuation is empty.
        references: right answers, any of which counts.
        choices: token ids to choose from by their logits after the prompt; empty for a written answer.
        max_new_tokens: longest written answer, in tokens.
        stop: texts before which a written answer ends.
        loaded_from: the data set as it was loaded, which names its source.
    """

    request: Request
    references: tuple[str, ...]
    loaded_from: Loaded
    choices: tuple[int, ...] = ()
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()


class Task(ABC):
    """A kind of examples and their score. Adding one: a file here and a line in `__init__.py`.

    Attributes:
        metric: what a score measures, for tables; more is better.
    """

    name: str
    description: str
    metric: str

    @abstractmethod
    def examples(
        self, tokenizer: Tokenizer, count: int, seed: int = 0, *, max_tokens: int | None = None
    ) -> list[Example]:
        """`count` distinct examples, the same for the same seed.

        `max_tokens` is the room for prompt and answer together, such as the model's context. Raises `BadInput` when
        the data has fewer rows, or when an example does not fit and the task does not cut its prompts.
        """

    @abstractmethod
    def score(self, answer: str | int, example: Example) -> float:
        """The score, 0 to 1, of a written text or of the index into `example.choices`."""


def draw(task: Task, rows: Sequence[RowType], count: int, seed: int) -> list[RowType]:
    """`count` of `rows` in an order that `seed` picks; a larger count begins with the rows of a smaller one."""
    if count < 1:
        raise BadInput(f"count must be at least 1, got {count}")
    if len(rows) < count:
        raise BadInput(f"task {task.name!r} has {len(rows)} examples, {count} requested")
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order[:count]


def whole_prompt(task: Task, tokenizer: Tokenizer, text: str, new_tokens: int, max_tokens: int | None) -> Request:
    """The request of `text`; raises `BadInput` when it and its answer are more than `max_tokens`."""
    prompt = encode(tokenizer, text)
    if max_tokens is not None and len(prompt) + new_tokens > max_tokens:
        raise BadInput(
            f"task {task.name!r}: a prompt of {len(prompt)} tokens and {new_tokens} new ones are more than the "
            f"{max_tokens} that the model can attend to"
        )
    return Request(prompt, (), text)


def cut_prompt(task: Task, tokenizer: Tokenizer, text: str, new_tokens: int, max_tokens: int | None) -> Request:
    """As `whole_prompt`, but a prompt that is too long loses its middle (LongBench, `pred.py`)."""
    prompt = encode(tokenizer, text)
    room = len(prompt) if max_tokens is None else max_tokens - new_tokens
    if room < 2:
        raise BadInput(f"task {task.name!r}: {new_tokens} new tokens leave no room for a prompt in {max_tokens}")
    if len(prompt) <= room:
        return Request(prompt, (), text)
    half = room // 2
    halves = (prompt[:half], prompt[-half:])
    decoded = (
        tokenizer.decode(list(part), skip_special_tokens=True, clean_up_tokenization_spaces=False) for part in halves
    )
    return Request(halves[0] + halves[1], (), "".join(decoded))
