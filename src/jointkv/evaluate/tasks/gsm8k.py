"""GSM8K: grade-school problems, a few worked examples before each, exact match of the final number."""

from __future__ import annotations

import re

from jointkv.errors import BadInput
from jointkv.evaluate.datasets import QuestionRow, get_dataset
from jointkv.evaluate.tasks.base import Example, Task, draw, whole_prompt
from jointkv.evaluate.traffic.base import Tokenizer
from jointkv.evaluate.traffic.four_shot import EXAMPLE_ROWS
from jointkv.evaluate.traffic.gsm8k import load_problems

MAX_NEW_TOKENS = 256
STOP = ("Question:",)
_MARKED = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")
_NUMBER = re.compile(r"-?[\d,]*\.?\d+")


def final_number(text: str, *, strict: bool = False) -> str | None:
    """The number after `####`; without one the last number of `text`, or None if `strict`. Written as `plain`."""
    marked = _MARKED.search(text)
    if marked:
        return plain(marked.group(1))
    numbers = [] if strict else _NUMBER.findall(text)
    return plain(numbers[-1]) if numbers else None


def plain(number: str) -> str:
    """`number` without thousands separators, and without decimals that are all zero."""
    number = number.replace(",", "")
    whole, _, decimals = number.partition(".")
    return whole or "0" if not decimals.strip("0") else number


class Gsm8k(Task):
    """Problems with `shots` fixed worked examples, which are never asked."""

    metric = "exact match"

    def __init__(self, shots: int = len(EXAMPLE_ROWS), *, strict: bool = False) -> None:
        if not 0 <= shots <= len(EXAMPLE_ROWS):
            raise BadInput(f"shots must be 0 to {len(EXAMPLE_ROWS)}, got {shots}")
        self.name = "gsm8k_strict" if strict else "gsm8k"
        where = "the number after ####" if strict else "the number after ####, or else the last number"
        self.description = f"grade-school problems after {shots} worked examples; {where}"
        self._shots, self._strict = shots, strict

    def examples(
        self, tokenizer: Tokenizer, count: int, seed: int = 0, *, max_tokens: int | None = None
    ) -> list[Example]:
        problems = load_problems()
        worked = [problems[row] for row in EXAMPLE_ROWS]
        shown = "".join(f"{problem.worked}\n\n" for problem in worked[: self._shots])
        never = {problem.question for problem in worked}
        loaded = get_dataset("GSM8K").load()
        asked = [row for row in loaded.rows if row.prompt not in never]
        made = []
        for row in draw(self, asked, count, seed):
            assert isinstance(row, QuestionRow)
            request = whole_prompt(self, tokenizer, shown + row.text, MAX_NEW_TOKENS, max_tokens)
            made.append(Example(request, (plain(row.final),), loaded, max_new_tokens=MAX_NEW_TOKENS, stop=STOP))
        return made

    def score(self, answer: str | int, example: Example) -> float:
        return float(final_number(str(answer), strict=self._strict) in example.references)
