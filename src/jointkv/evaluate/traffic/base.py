"""What every traffic is made of: requests as token ids, and the tokenizer they come from."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from jointkv.errors import BadInput
from jointkv.policy import Scope


class Tokenizer(Protocol):
    """The part of a `transformers` tokenizer that a traffic needs."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> Any: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def all_special_ids(self) -> list[int]: ...

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any: ...

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str: ...


@dataclass(frozen=True)
class Course:
    """Where in a conversation a request stands.

    Attributes:
        session: number of the conversation, whose requests come in their order.
        tenant: whose it is; only requests of one tenant may share anything.
        seconds: when it comes, after the first request of all.
        think: seconds after the answer before.
        messages: the prompt as `(role, content)`, as a chat has it.
    """

    session: int
    tenant: str
    seconds: float
    think: float
    messages: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Request:
    """One request: the prompt to prefill and the true tokens that follow it, both as token ids.

    `text` is the prompt as text, without special tokens; `course` is None for a request on its own; `answer` is the
    true one in full, where there is one.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    text: str
    course: Course | None = None
    answer: str | None = None


class Traffic(ABC):
    """A kind of requests that a server may see. Adding one: a file here and a line in `__init__.py`.

    `scope` is where its likeness lies, as in `FusionPolicy`: between requests, or between the chunks of one.
    """

    name: str
    description: str
    scope: Scope = "batch"

    @abstractmethod
    def draw(self, tokenizer: Tokenizer, count: int, continuation_tokens: int, rng: random.Random) -> Iterator[Request]:
        """Distinct requests in the order of their use, of which `count` will be taken. Raises `BadInput`."""

    def requests(
        self, tokenizer: Tokenizer, count: int, *, continuation_tokens: int = 48, seed: int = 0
    ) -> list[Request]:
        """`count` distinct requests with `continuation_tokens` true next tokens each; one seed, one result.

        Raises `BadInput` when the data and the tokenizer do not yield that many; it says how many they do.
        """
        if count < 1:
            raise BadInput(f"count must be at least 1, got {count}")
        if continuation_tokens < 1:
            raise BadInput(f"continuation_tokens must be at least 1, got {continuation_tokens}")
        made = list(islice(self.draw(tokenizer, count, continuation_tokens, random.Random(seed)), count))
        if len(made) < count:
            raise BadInput(
                f"traffic {self.name!r} can make {len(made)} distinct requests with {continuation_tokens} "
                f"continuation tokens and this tokenizer, {count} requested"
            )
        return made


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token in front of a prompt."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of `text` as a prompt: a beginning-of-sequence token if the tokenizer adds one, no end token.

    An end token would stand between a prompt and its continuation.
    """
    token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokenizer.bos_token_id is not None and begins_with_bos(tokenizer):
        return (tokenizer.bos_token_id, *token_ids)
    return token_ids


def disjoint_runs(tokenizer: Tokenizer, texts: Iterable[str], separator: str, tokens: int) -> Iterator[tuple[int, ...]]:
    """Disjoint stretches of consecutive `texts`, joined by `separator` and cut to `tokens` tokens each."""
    stretch: list[str] = []
    alone = 0
    for text in texts:
        stretch.append(text)
        alone += len(encode(tokenizer, text))
        # Joined text has its own tokens, but tokenizing it again for each part would take quadratic time.
        if alone < tokens:
            continue
        token_ids = encode(tokenizer, separator.join(stretch))
        if len(token_ids) >= tokens:
            yield token_ids[:tokens]
            stretch, alone = [], 0


def cut_request(tokenizer: Tokenizer, token_ids: tuple[int, ...], prompt_tokens: int) -> Request:
    """The request whose prompt is the first `prompt_tokens` of `token_ids` and whose continuation is the rest."""
    prompt = token_ids[:prompt_tokens]
    text = tokenizer.decode(list(prompt), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Request(prompt, token_ids[prompt_tokens:], text)


def split_request(tokenizer: Tokenizer, prompt_text: str, answer: str, continuation_tokens: int) -> Request | None:
    """The request whose continuation is the start of `answer`; None if the answer is too short.

    Prompt and answer are tokenized together, as a model that writes the answer would see them. None also when
    a token spans the border of the two, because then no prefix of the tokens is the prompt.
    """
    prompt = encode(tokenizer, prompt_text)
    whole = encode(tokenizer, prompt_text + answer)
    continuation = whole[len(prompt) : len(prompt) + continuation_tokens]
    if whole[: len(prompt)] != prompt or len(continuation) < continuation_tokens:
        return None
    return Request(prompt, continuation, prompt_text)
