"""What every task is made of: prompts with known answers, and a score from 0 to 1 for what a model made of them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from jointkv.errors import BadInput
from jointkv.evaluate.datasets import Loaded, Row
from jointkv.evaluate.request_files import UserRequest, chat_text
from jointkv.evaluate.request_sources import Place
from jointkv.evaluate.traffic.base import Request, Tokenizer, encode

RowType = TypeVar("RowType", bound=Row)


@dataclass(frozen=True)
class Example:
    """One prompt with its right answers; the model writes an answer, or chooses one, or both.

    Attributes:
        request: the prompt; its continuation is empty.
        references: right answers, any of which counts.
        choices: answers, as token ids after the prompt, of which the likeliest is chosen; may be empty.
        max_new_tokens: longest written answer, in tokens; 0 where the score is that of the choice.
        stop: texts before which a written answer ends.
        loaded_from: the data set as it was loaded, which names its source.
    """

    request: Request
    references: tuple[str, ...]
    loaded_from: Loaded
    choices: tuple[tuple[int, ...], ...] = ()
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


def whole_prompt(
    task: Task, tokenizer: Tokenizer, text: str, new_tokens: int, max_tokens: int | None, *, chat: bool = False
) -> Request:
    """The request of `text`; raises `BadInput` when it and its answer are more than `max_tokens`.

    With `chat` it is a user's message in the tokenizer's chat template, where there is one. A model that was tuned to
    chat ends its turn at once behind a bare question, and its answer is empty. Worked examples and code go bare.
    """
    request = _request(tokenizer, text, chat)
    if max_tokens is not None and len(request.prompt) + new_tokens > max_tokens:
        raise BadInput(
            f"task {task.name!r}: a prompt of {len(request.prompt)} tokens and {new_tokens} new ones are more than the "
            f"{max_tokens} that the model can attend to"
        )
    return request


def cut_prompt(
    task: Task, tokenizer: Tokenizer, text: str, new_tokens: int, max_tokens: int | None, *, chat: bool = False
) -> Request:
    """As `whole_prompt`, but a prompt that is too long loses its middle (LongBench, `pred.py`)."""
    request = _request(tokenizer, text, chat)
    room = len(request.prompt) if max_tokens is None else max_tokens - new_tokens
    if room < 2:
        raise BadInput(f"task {task.name!r}: {new_tokens} new tokens leave no room for a prompt in {max_tokens}")
    if len(request.prompt) <= room:
        return request
    half = room // 2
    halves = (request.prompt[:half], request.prompt[-half:])
    decoded = (
        tokenizer.decode(list(part), skip_special_tokens=True, clean_up_tokenization_spaces=False) for part in halves
    )
    return Request(halves[0] + halves[1], (), "".join(decoded))


def _request(tokenizer: Tokenizer, text: str, chat: bool) -> Request:
    if not (chat and tokenizer.chat_template):
        return Request(encode(tokenizer, text), (), text)
    # Its special tokens are the template's own: none is put before them.
    text = chat_text(tokenizer, UserRequest(Place("", "prompt", 0), text))
    return Request(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), (), text)


def answer_tokens(tokenizer: Tokenizer, request: Request, answer: str) -> tuple[int, ...]:
    """What `answer` is behind the prompt, whose text must be whole.

    Raises `BadInput` where the tokenizer joins the two, or finds nothing in the answer.
    """
    texts = (request.text, request.text + answer)
    prompt, whole = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise BadInput(f"the tokenizer makes no tokens of their own of {answer!r} after the prompt")
    return whole[len(prompt) :]
