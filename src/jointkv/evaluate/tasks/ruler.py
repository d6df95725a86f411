"""RULER's needle: a key is asked for that stands among many like it in a long text.

Source: Hsieh et al., "RULER", arXiv 2404.06654; score `string_match_all` and answer length of `NVIDIA/RULER`.
"""

from __future__ import annotations

from jointkv.evaluate.datasets import RulerNeedle
from jointkv.evaluate.tasks.base import Example, Task, draw, whole_prompt
from jointkv.evaluate.traffic.base import Tokenizer

MAX_NEW_TOKENS = 128


class Ruler(Task):
    """`niah_multikey_3` at 4k tokens: every line of the text is a needle, one is asked for."""

    name = "ruler_needle"
    description = "RULER niah_multikey_3: one of many random ids in 4k tokens"
    metric = "recall"

    def examples(
        self, tokenizer: Tokenizer, count: int, seed: int = 0, *, max_tokens: int | None = None
    ) -> list[Example]:
        loaded = RulerNeedle().load()
        return [
            Example(
                whole_prompt(self, tokenizer, row.text, MAX_NEW_TOKENS, max_tokens),
                row.answers,
                loaded,
                max_new_tokens=MAX_NEW_TOKENS,
            )
            for row in draw(self, loaded.rows, count, seed)
        ]

    def score(self, answer: str | int, example: Example) -> float:
        found = [reference.lower() in str(answer).lower() for reference in example.references]
        return sum(found) / len(found)
