"""Unrelated traffic: requests that share no text, the case in which fusion must find almost nothing."""

import random
from collections.abc import Iterator

from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, cut_request, disjoint_runs
from jointkv.evaluate.traffic.gsm8k import load_problems

PROMPT_TOKENS = 256


class Unrelated(Traffic):
    """Disjoint runs of consecutive problems with answers, each cut to `PROMPT_TOKENS` tokens of prompt."""

    name = "unrelated"
    description = f"disjoint runs of GSM8K problems and answers, {PROMPT_TOKENS} prompt tokens each"

    def draw(self, tokenizer: Tokenizer, count: int, continuation_tokens: int, rng: random.Random) -> Iterator[Request]:
        """The runs are the same for every seed, which picks and orders them."""
        worked = (problem.worked for problem in load_problems())
        runs = list(disjoint_runs(tokenizer, worked, "\n\n", PROMPT_TOKENS + continuation_tokens))
        for run in rng.sample(runs, min(count, len(runs))):
            yield cut_request(tokenizer, run, PROMPT_TOKENS)
