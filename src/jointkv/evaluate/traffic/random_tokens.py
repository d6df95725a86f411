"""vLLM's random data: prompts of token ids without meaning, the load of most throughput figures."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from jointkv.errors import BadInput
from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, begins_with_bos, cut_request


@dataclass(frozen=True)
class RandomTokens(Traffic):
    """Prompts of `tokens` consecutive ids of the vocabulary from a random start, special tokens left out.

    As `vllm bench` makes them for `--dataset-name random` (class `RandomDataset`), with two differences: starts
    are drawn without repetition, and the ids are sent as they are, not as text that is tokenized again.
    """

    tokens: int = 1024

    name = "random_tokens"
    description = "vLLM's random data: consecutive token ids from a random start"

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise BadInput(f"tokens must be at least 2, got {self.tokens}")

    def draw(self, tokenizer: Tokenizer, count: int, continuation_tokens: int, rng: random.Random) -> Iterator[Request]:
        """A continuation goes on counting, and starts anew at the vocabulary's end."""
        special = set(tokenizer.all_special_ids)
        allowed = [token_id for token_id in range(tokenizer.vocab_size) if token_id not in special]
        bos = tokenizer.bos_token_id
        first = (bos,) if bos is not None and begins_with_bos(tokenizer) else ()
        drawn = self.tokens - len(first) + continuation_tokens
        for start in rng.sample(range(len(allowed)), min(count, len(allowed))):
            run = tuple(allowed[(start + step) % len(allowed)] for step in range(drawn))
            yield cut_request(tokenizer, first + run, self.tokens)
