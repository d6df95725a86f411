"""MMLU: questions with four choices after five solved ones of the subject; the answer is the likeliest letter.

Source: Hendrycks et al., "Measuring Massive Multitask Language Understanding", arXiv 2009.03300; the prompt is that of
their `evaluate.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from jointkv.errors import BadInput
from jointkv.evaluate import datasets
from jointkv.evaluate.tasks.base import Example, Task, answer_tokens, draw, whole_prompt
from jointkv.evaluate.traffic.base import Request, Tokenizer

PAPER_SUBJECTS = ("conceptual_physics", "electrical_engineering", "formal_logic")
LETTERS = "ABCD"
SHOTS = 5


class Mmlu(Task):
    """Questions of `subjects`, equally many of each (the first ones have one more where that does not divide).

    The questions of a subject follow each other, because its solved ones are what requests of a batch can share.
    """

    metric = "accuracy"

    def __init__(self, subjects: Sequence[str] = PAPER_SUBJECTS) -> None:
        self._subjects = tuple(subjects)
        self.name = "mmlu" if self._subjects == PAPER_SUBJECTS else f"mmlu_{'_'.join(self._subjects)}"
        self.description = f"{SHOTS}-shot questions with four choices: {', '.join(self._subjects)}"

    def examples(
        self, tokenizer: Tokenizer, count: int, seed: int = 0, *, max_tokens: int | None = None
    ) -> list[Example]:
        made: list[Example] = []
        for index, subject in enumerate(self._subjects):
            share = (count + len(self._subjects) - 1 - index) // len(self._subjects)
            if share or not index:
                made += self._of_subject(subject, tokenizer, share, seed, max_tokens)
        return made

    def _of_subject(
        self, subject: str, tokenizer: Tokenizer, count: int, seed: int, max_tokens: int | None
    ) -> list[Example]:
        topic = subject.replace("_", " ")
        solved = datasets.Mmlu(subject, "dev").load(SHOTS)
        head = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        head += "".join(f"{row.text} {row.answers[0]}\n\n" for row in solved.rows)
        loaded = datasets.Mmlu(subject).load()
        made = []
        for row in draw(self, loaded.rows, count, seed):
            request = whole_prompt(self, tokenizer, head + row.text, 1, max_tokens)
            choices = letter_tokens(tokenizer, request)
            made.append(Example(request, row.answers, loaded, choices))
        return made

    def score(self, answer: str | int, example: Example) -> float:
        assert isinstance(answer, int), "a choice is given by its index"
        return float(LETTERS[answer] in example.references)


def letter_tokens(tokenizer: Tokenizer, request: Request) -> tuple[tuple[int, ...], ...]:
    """The token that each letter is after the prompt. Raises `BadInput` when one is no single token."""
    found = tuple(answer_tokens(tokenizer, request, f" {letter}") for letter in LETTERS)
    for letter, tokens in zip(LETTERS, found, strict=True):
        if len(tokens) != 1:
            raise BadInput(f"the tokenizer makes no single token of {' ' + letter!r} after the prompt")
    return found
