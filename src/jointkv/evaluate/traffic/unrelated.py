"""Unrelated traffic: requests that share no text, the case in which fusion must find almost nothing."""

import random

from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, check_counts, cut_request, disjoint_runs, too_few
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
        worked = (problem.worked for problem in load_problems())
        runs = list(disjoint_runs(tokenizer, worked, "\n\n", PROMPT_TOKENS + continuation_tokens))
        if len(runs) < count:
            raise too_few(self, count, len(runs), continuation_tokens)
        return [cut_request(tokenizer, run, PROMPT_TOKENS) for run in random.Random(seed).sample(runs, count)]
