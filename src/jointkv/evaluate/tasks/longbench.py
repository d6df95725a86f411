"""LongBench: long documents and code files with a question, scored as its authors do.

Source: Bai et al., arXiv 2308.14508; answer lengths, cutting in the middle and scores of `THUDM/LongBench`. As there,
questions are put in the chat template of a model that has one, and code is sent as it is.
"""

from __future__ import annotations

from collections.abc import Callable

from jointkv.evaluate import datasets
from jointkv.evaluate.tasks.base import Example, Task, cut_prompt, draw
from jointkv.evaluate.tasks.metrics import edit_similarity, rouge_l, token_f1
from jointkv.evaluate.traffic.base import Tokenizer


class LongBench(Task):
    """One of LongBench's data sets.

    Args:
        data: LongBench's name of the data set.
        metric: what `compare` computes.
        compare: score of an answer against one reference; the best of all references counts.
        max_new_tokens: longest answer.
        chat: whether the prompt is a user's message.
    """

    def __init__(
        self,
        data: str,
        metric: str,
        compare: Callable[[str, str], float],
        max_new_tokens: int,
        *,
        chat: bool,
    ) -> None:
        self.name = f"longbench_{data.replace('-', '_')}"
        self.description = f"LongBench {data}, prompts cut in the middle to the model's context"
        self.metric = metric
        self._data, self._compare, self._max_new_tokens, self._chat = data, compare, max_new_tokens, chat

    def examples(
        self, tokenizer: Tokenizer, count: int, seed: int = 0, *, max_tokens: int | None = None
    ) -> list[Example]:
        loaded = datasets.LongBench(self._data).load()
        new_tokens = self._max_new_tokens
        return [
            Example(
                cut_prompt(self, tokenizer, row.text, new_tokens, max_tokens, chat=self._chat),
                row.answers,
                loaded,
                max_new_tokens=new_tokens,
            )
            for row in draw(self, loaded.rows, count, seed)
        ]

    def score(self, answer: str | int, example: Example) -> float:
        return max(self._compare(str(answer), reference) for reference in example.references)


LONGBENCH = (
    LongBench("qmsum", "ROUGE-L", rouge_l, 512, chat=True),
    LongBench("lcc", "edit similarity", edit_similarity, 64, chat=False),
    LongBench("repobench-p", "edit similarity", edit_similarity, 64, chat=False),
    LongBench("hotpotqa", "token F1", token_f1, 32, chat=True),
    LongBench("2wikimqa", "token F1", token_f1, 32, chat=True),
)
