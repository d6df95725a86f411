"""Unrelated traffic: requests that share no text, the case in which fusion must find almost nothing."""

import random

from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, check_counts, encode, too_few
from jointkv.evaluate.traffic.gsm8k import load_problems

PROMPT_TOKENS = 256


class Unrelated(Traffic):
    """Disjoint runs of consecutive problems with answers, each cut to `PROMPT_TOKENS` tokens of prompt."""

    name = "unrelated"
    description = f"disjoint runs of GSM8K problems and answers, {PROMPT_TOKENS} prompt tokens each"

    def requests(
        self, tokenizer: Tokenizer, count: int, *, continuation_tokens: int = 48, seed: int = 0
    ) -> list[Request]:
        """See `Traffic.requests`; the runs are the same for every seed, which picks and orders them."""
        check_counts(count, continuation_tokens)
        runs = _runs(tokenizer, PROMPT_TOKENS + continuation_tokens)
        if len(runs) < count:
            raise too_few(self, count, len(runs), continuation_tokens)
        return [_cut(tokenizer, run) for run in random.Random(seed).sample(runs, count)]


def _runs(tokenizer: Tokenizer, tokens: int) -> list[tuple[int, ...]]:
    """Disjoint stretches of the sample, `tokens` tokens each."""
    runs: list[tuple[int, ...]] = []
    stretch: list[str] = []
    alone = 0
    for problem in load_problems():
        stretch.append(problem.worked)
        alone += len(encode(tokenizer, problem.worked))
        # Joined text has its own tokens, but tokenizing it again for each problem would take quadratic time.
        if alone < tokens:
            continue
        token_ids = encode(tokenizer, "\n\n".join(stretch))
        if len(token_ids) >= tokens:
            runs.append(token_ids[:tokens])
            stretch, alone = [], 0
    return runs


def _cut(tokenizer: Tokenizer, run: tuple[int, ...]) -> Request:
    prompt = run[:PROMPT_TOKENS]
    text = tokenizer.decode(list(prompt), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Request(prompt, run[PROMPT_TOKENS:], text)
