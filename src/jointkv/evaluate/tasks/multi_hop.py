"""Multi-hop questions on passages that several prompts have in common, each in an order of its own.

Questions, passages and scores are those of LongBench's 2WikiMQA and HotpotQA (arXiv 2308.14508), whose prompts as they
are have no passage in common. Here some questions share their passages, as after one search, so that what is read at
another position and behind other text decides about the answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from jointkv.evaluate.datasets import LongBench, Row
from jointkv.evaluate.datasets.long_context import PASSAGES_INSTRUCTION
from jointkv.evaluate.tasks.base import Example, Task, answer_tokens, draw, whole_prompt
from jointkv.evaluate.tasks.metrics import normalized_words, token_f1
from jointkv.evaluate.traffic.base import Request, Tokenizer

DATA = ("2wikimqa", "hotpotqa")
QUESTIONS = 4
"""Questions that have their passages in common."""

PASSAGES = 2
"""That each of them brings: two hops need two."""

WORDS = 60
"""Of a passage, at most: the opening of an article, which says what it is about."""

CHOICES = 4
"""Answers whose likelihoods are compared: the right one, and those of other questions, first of the same passages."""

MAX_NEW_TOKENS = 32

_PASSAGE = re.compile(r"(?:^|\n)Passage \d+:\n")


class MultiHop(Task):
    """Questions in groups of `QUESTIONS`; a batch should hold whole groups.

    The prompt of each has all passages of its group. The first of a group finds nothing in earlier prompts but the
    instruction; the others find all passages, at other positions. What is written is scored; beside it stands how
    likely the right answer is among those of other questions, which tells something of a model that writes none.
    """

    name = "multi_hop"
    description = f"2WikiMQA and HotpotQA, {QUESTIONS} questions on the same passages, each in an order of its own"
    metric = "token F1"

    def examples(
        self, tokenizer: Tokenizer, count: int, seed: int = 0, *, max_tokens: int | None = None
    ) -> list[Example]:
        loaded_from = {row: loaded for loaded in (LongBench(data).load() for data in DATA) for row in loaded.rows}
        rng = random.Random(seed)
        made = []
        rows = draw(self, list(loaded_from), count, seed)
        for group in (rows[first : first + QUESTIONS] for first in range(0, count, QUESTIONS)):
            passages = list(dict.fromkeys(passage for row in group for passage in chosen_passages(row)))
            for row in group:
                text = _prompt(rng.sample(passages, len(passages)), question_of(row))
                request = whole_prompt(self, tokenizer, text, MAX_NEW_TOKENS, max_tokens, chat=True)
                choices = _choices(row, [*group, *loaded_from])
                tokens = tuple(_tokens(tokenizer, request, choice) for choice in choices)
                made.append(Example(request, row.answers, loaded_from[row], tokens, MAX_NEW_TOKENS))
        return made

    def score(self, answer: str | int, example: Example) -> float:
        if isinstance(answer, int):
            return float(answer == 0)  # the right one is the first of the choices
        return max(token_f1(answer, reference) for reference in example.references)


def question_of(row: Row) -> str:
    """The question of one of LongBench's prompts."""
    return row.text.rpartition("\nQuestion: ")[2].removesuffix("Answer:").strip()


def chosen_passages(row: Row) -> list[str]:
    """The openings of the `PASSAGES` passages of a LongBench prompt that tell most of the answer, in their order.

    First those whose title the question names, then those with an answer, then those with most of the question's words.
    """
    context = row.text.rpartition("\nQuestion: ")[0].strip().removesuffix(PASSAGES_INSTRUCTION)
    openings = [" ".join(passage.split(" ")[:WORDS]).strip() for passage in _PASSAGE.split(context)[1:]]
    question, answers = question_of(row).lower(), [answer.lower() for answer in row.answers]
    words = set(normalized_words(question))

    def told(opening: str) -> tuple[bool, bool, int]:
        title = opening.partition("\n")[0].lower()
        has_answer = any(answer in opening.lower() for answer in answers)
        return title in question, has_answer, len(words.intersection(normalized_words(opening)))

    best = sorted(range(len(openings)), key=lambda index: told(openings[index]), reverse=True)[:PASSAGES]
    return [openings[index] for index in sorted(best)]


def _prompt(passages: Sequence[str], question: str) -> str:
    given = "\n\n".join(passages)
    return f"{PASSAGES_INSTRUCTION}\n\n{given}\n\n{PASSAGES_INSTRUCTION}\n\nQuestion: {question}\nAnswer:"


def _choices(row: Row, others: Sequence[Row]) -> list[str]:
    """An answer of `row`, and the first of `others` that no answer of `row` shares a word with."""
    wrong = dict.fromkeys(other.answers[0] for other in others)
    apart = [each for each in wrong if not any(token_f1(each, answer) for answer in row.answers)]
    return [row.answers[0], *apart[: CHOICES - 1]]


def _tokens(tokenizer: Tokenizer, request: Request, answer: str) -> tuple[int, ...]:
    return answer_tokens(tokenizer, request, answer if request.text[-1].isspace() else f" {answer}")
