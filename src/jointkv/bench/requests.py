"""Where the requests of a serving benchmark come from; whatever the source, they end as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jointkv.errors import BadInput
from jointkv.evaluate.traffic import get_traffic
from jointkv.evaluate.traffic.base import Request, Tokenizer, encode

VLLM_DATA = {
    "random": ("RandomDataset", "vLLM's random data: consecutive token ids from a random start, 1024 tokens"),
    "prefix_repetition": (
        "PrefixRepetitionRandomDataset",
        "vLLM's prefix repetition: 10 prefixes of 256 random tokens, each with suffixes of 256 random tokens",
    ),
}
"""Class and description of the data that `vllm bench` makes up."""
PREFIXES = 10


@dataclass(frozen=True)
class ServingRequest:
    """One request as it is sent.

    Attributes:
        prompt: token ids.
        output_tokens: how many are generated, whatever end tokens come up.
        timestamp: seconds after the first request of the log it was taken from, whose requests stand in the order of
            time; None where arrival is the load's business.
        session: of which conversation it is a turn; it is not sent before the turn before it is answered.
        think: seconds that pass between the two.
        salt: of whose requests alone it may share pages, vLLM's `cache_salt`.
        answer: the true one, where it is known.
    """

    prompt: tuple[int, ...]
    output_tokens: int
    timestamp: float | None = None
    session: int | str | None = None
    think: float = 0.0
    salt: str | None = None
    answer: str | None = None

    @property
    def tokens(self) -> int:
        """Of prompt and output together."""
        return len(self.prompt) + self.output_tokens


@dataclass(frozen=True)
class Limits:
    """How long a request may be.

    Attributes:
        model_tokens: longest context of the model; None where it does not say.
        pool_blocks: of the arms without a larger pool; vLLM keeps one of them for itself.
    """

    model_tokens: int | None
    pool_blocks: int
    block_size: int

    def problem(self, request: ServingRequest) -> str | None:
        """Why `request` cannot be served; None if it can."""
        if self.model_tokens is not None and request.tokens > self.model_tokens:
            return f"{request.tokens} tokens with its output, and the model reads {self.model_tokens}"
        needed = -(-request.tokens // self.block_size) + 1
        if needed > self.pool_blocks:
            return (
                f"{request.tokens} tokens with its output, which takes a pool of {needed} blocks of {self.block_size}, "
                f"one of them for vLLM itself; there are {self.pool_blocks}"
            )
        return None


@dataclass(frozen=True)
class Workload:
    """The requests of a benchmark, the same in every arm and round.

    Attributes:
        description: what they are, what stands in for what, and what was left out.
        warmup: served before them, and not measured.
    """

    name: str
    description: str
    requests: tuple[ServingRequest, ...]
    warmup: tuple[ServingRequest, ...] = ()

    def split(self, warmup: int) -> Workload:
        """The first `warmup` requests for before, the others from time 0 on. Raises `BadInput` if none is left."""
        if warmup >= len(self.requests):
            raise BadInput(f"--warmup {warmup}: of {len(self.requests)} requests none would be left to measure")
        before, rest = self.requests[:warmup], self.requests[warmup:]
        first = rest[0].timestamp
        if first is not None:
            rest = tuple(replace(each, timestamp=(each.timestamp or 0.0) - first) for each in rest)
        return replace(self, requests=rest, warmup=before)


def from_traffic(
    name: str, tokenizer: Tokenizer, count: int, output_tokens: int, seed: int, limits: Limits
) -> Workload:
    """`count` requests of a traffic of `jointkv.evaluate`, of a data set (`dataset:NAME`), or of `VLLM_DATA`.

    Raises:
        BadInput: an unknown name, too few requests in it, or one that neither model nor pool can take.
        ModuleNotFoundError: the data is vLLM's, and that is not installed.
    """
    if name.replace("-", "_") in VLLM_DATA:
        name = name.replace("-", "_")
        description = VLLM_DATA[name][1]
        requests = tuple(
            ServingRequest(prompt, output_tokens) for prompt in _vllm_prompts(name, tokenizer, count, seed)
        )
    else:
        traffic = get_traffic(name)
        made = traffic.requests(tokenizer, count, continuation_tokens=1, seed=seed)
        name, description = traffic.name, traffic.description
        requests = tuple(_from_request(request, output_tokens) for request in made)
    problem = limits.problem(max(requests, key=lambda request: request.tokens))
    if problem is not None:
        raise BadInput(f"traffic {name!r}: the longest request has {problem}")
    return Workload(name, description, requests)


def _from_request(request: Request, output_tokens: int) -> ServingRequest:
    course = request.course
    if course is None:
        return ServingRequest(request.prompt, output_tokens, answer=request.answer)
    return ServingRequest(request.prompt, output_tokens, session=course.session, think=course.think, salt=course.tenant)


def _vllm_prompts(name: str, tokenizer: Any, count: int, seed: int) -> Sequence[tuple[int, ...]]:
    """Prompts as `vllm bench serve --dataset-name` sends them: as text, which the server makes tokens of."""
    from vllm.benchmarks import datasets

    # The same number of requests for every prefix, so possibly too many; they come shuffled.
    rounded = -(-count // PREFIXES) * PREFIXES if name == "prefix_repetition" else count
    samples = getattr(datasets, VLLM_DATA[name][0])(random_seed=seed).sample(tokenizer, rounded)
    return [encode(tokenizer, sample.prompt) for sample in samples[:count]]
