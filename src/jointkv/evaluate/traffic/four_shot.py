"""Requests that differ in a short header and in their question and share four worked examples in between."""

import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence

from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, split_request
from jointkv.evaluate.traffic.gsm8k import Problem, load_problems

# Rows of the sample with long, correct answers: together about 700 tokens with a vocabulary of 49k.
EXAMPLE_ROWS = (42, 49, 54, 57)


def shared_text(problems: Sequence[Problem], rows: Sequence[int] = EXAMPLE_ROWS) -> str:
    """The text between a request's header and its question: the worked examples in `rows` and the next label.

    It neither starts nor ends inside a run of whitespace, where tokenizers merge across the border.
    """
    examples = "".join(f"\n\n{problems[row].worked}" for row in rows)
    return f"{examples}\n\nQuestion:"


class FourShotTraffic(Traffic):
    """Base of the traffics of the form header, four worked examples, own question."""

    @abstractmethod
    def headers(self, tokenizer: Tokenizer, shared: str, count: int, rng: random.Random) -> list[str]:
        """`count` distinct first lines, without line break; `shared` is the text that will follow each.

        Raises `BadInput` when it cannot find that many.
        """

    def example_rows(self, rng: random.Random) -> Sequence[int]:
        """The rows of one request's worked examples, in their order."""
        return EXAMPLE_ROWS

    def draw(self, tokenizer: Tokenizer, count: int, continuation_tokens: int, rng: random.Random) -> Iterator[Request]:
        """No question is used twice, and every seed has the same four examples."""
        problems = load_problems()
        questions = [problem for row, problem in enumerate(problems) if row not in EXAMPLE_ROWS]
        rng.shuffle(questions)
        headers = iter(self.headers(tokenizer, shared_text(problems), min(count, len(questions)), rng))
        header = next(headers)
        for problem in questions:
            shared = shared_text(problems, self.example_rows(rng))
            prompt_text = f"{header}{shared} {problem.question}\nAnswer:"
            request = split_request(tokenizer, prompt_text, f" {problem.answer}", continuation_tokens)
            if request is not None:
                yield request
                header = next(headers, header)
