"""Requests of users: prompts, messages with tools, or conversations, from any of the sources that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, Field, TypeAdapter

from jointkv.errors import BadInput
from jointkv.evaluate.block_traces import MOST_TOKENS, BlockId, block_tokens, synthetic_tokens
from jointkv.evaluate.jsonl import Text, located, validated
from jointkv.evaluate.messages import Message, System, Tools
from jointkv.evaluate.request_shapes import ANSWER_FIELDS, TEXT_FIELDS, fields_of
from jointkv.evaluate.request_sources import Place, entries
from jointkv.evaluate.traffic.base import encode

OUTPUT_FIELDS = ("output_tokens", "max_tokens", "max_completion_tokens", "output_length")


@dataclass(frozen=True)
class UserRequest:
    """One request of a user: a prompt, or messages that the model's chat template turns into one, or hashes of blocks.

    Exactly one of the three is set: `messages` and `hash_ids` are empty and `prompt` is None where it is another one.

    Attributes:
        place: where it stands, or the number of a prompt that was given otherwise.
        tools: descriptions that go to the chat template with the messages.
        system: what a log holds apart from the messages; it has become the first of them in what is read.
        answer: the text that truly followed, None where there is none.
        hash_ids: of the prompt's blocks, where the log has no text.
        input_length: tokens of the prompt, likewise.
        block_size: tokens of such a block, where the log says it.
        from_conversation: whether it comes from a conversation in ShareGPT's format.
    """

    place: Place
    prompt: Annotated[Text | None, Field(validation_alias=AliasChoices(*TEXT_FIELDS))] = None
    messages: tuple[Message, ...] = ()
    tools: Tools = ()
    system: System = None
    answer: Annotated[Text | None, Field(validation_alias=AliasChoices(*ANSWER_FIELDS))] = None
    hash_ids: tuple[BlockId, ...] = ()
    input_length: Annotated[int | None, Field(ge=1, le=MOST_TOKENS)] = None
    block_size: Annotated[int | None, Field(ge=1)] = None
    from_conversation: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class SaltedRequest(UserRequest):
    """A request with `cache_salt`: whose requests alone it shares pages with, as in vLLM."""

    cache_salt: str | None = None


@dataclass(frozen=True)
class LoggedRequest(SaltedRequest):
    """A request of a log, with how much was generated for it and when it came, where the log says so.

    Attributes:
        session_id: of the conversation that it is a turn of.
    """

    output_tokens: Annotated[int | None, Field(ge=1, validation_alias=AliasChoices(*OUTPUT_FIELDS))] = None
    timestamp: datetime | None = None
    session_id: int | str | None = None


@dataclass(frozen=True)
class Unusable:
    """A place of which no request can be made, and why."""

    place: Place
    reason: str


Kind = TypeVar("Kind", bound=UserRequest)


def read_requests(source: str | Path, count: int | None = None) -> list[UserRequest]:
    """The first `count` requests of a source (None: all), which must be usable; see `iter_requests`.

    Raises `BadInput`, as `file:line: reason`, for the first that is not, and for a source without any; as
    `file: reason` for one that cannot be read.
    """
    found = []
    for request in iter_requests(source, UserRequest, count):
        if isinstance(request, Unusable):
            raise BadInput(f"{request.place}: {request.reason}")
        found.append(request)
        if len(found) == count:
            break
    if not found:
        raise BadInput(f"{source}:1: the file has no request")
    return found


def iter_requests(source: str | Path, kind: type[Kind], count: int | None = None) -> Iterator[Kind | Unusable]:
    """What stands at each place of a source, in order: a request, or why it is none. See `entries` for the sources.

    An entry is an object with `prompt`, `text` or `question`, or else `messages` in roles, with `tools` beside them, or
    else `conversations` in ShareGPT's format, or else `hash_ids` with `input_length`, as traces have them that hold no
    text; the first of these in this order counts. A request to OpenAI's batch API is in `body`. Messages of Anthropic's
    API have `system` beside them. The true continuation is the first of `answer`, `completion`, `response` and `output`
    that holds a string with text. Where the last of several messages is the assistant's, it is the true continuation
    instead, and no part of the prompt. Of a conversation the first turn is the prompt and the second the answer, as in
    vLLM's benchmark; a turn of the system before them goes with the prompt. Other fields are ignored, but for those of
    `kind`.

    Raises `BadInput` for a source that cannot be read.
    """
    adapter = TypeAdapter(kind)
    for entry in entries(source, count):
        try:
            given = {**fields_of(entry.fields()), "place": entry.place}
            yield _checked(_without_answer(_with_system(validated(adapter.validate_python, given))))
        except BadInput as error:
            yield Unusable(entry.place, str(error))


def _with_system(request: Kind) -> Kind:
    """`request` with what its log holds apart as the first of its messages."""
    if request.system is None:
        return request
    first: Any = {"role": "system", "content": request.system}
    return replace(request, messages=(first, *request.messages), system=None)


def _checked(request: Kind) -> Kind:
    """Raises `BadInput` for hashes of blocks whose size cannot be told."""
    if request.hash_ids:
        if request.input_length is None:
            raise BadInput("input_length: Field required beside hash_ids")
        block_tokens(request.input_length, len(request.hash_ids), request.block_size)
    elif request.prompt is None and not request.messages:
        raise BadInput("hash_ids: is empty")
    return request


def _without_answer(request: Kind) -> Kind:
    """`request` up to the last turn of the assistant, if it ends in one, and with that turn as its answer."""
    if len(request.messages) < 2 or request.messages[-1]["role"] != "assistant":
        return request
    said = request.messages[-1]["content"]
    return replace(request, messages=request.messages[:-1], answer=said if said.strip() else request.answer)


def prompts_of(tokenizer: Any, requests: Sequence[UserRequest], *, chat: bool = False) -> list[list[int]]:
    """`prompt_tokens` of each of `requests`. Raises `BadInput`, which names the place."""
    rows = []
    for request in requests:
        with located(str(request.place)):
            rows.append(list(prompt_tokens(tokenizer, request, chat=chat)))
    return rows


def prompt_tokens(tokenizer: Any, request: UserRequest, *, chat: bool = False) -> tuple[int, ...]:
    """Token ids to prefill for `request`; with `chat` a plain prompt becomes a user message where possible.

    Raises `BadInput` when there are messages and the tokenizer has no chat template, or refuses them.
    """
    if request.hash_ids:
        return traced_tokens(tokenizer, request)
    if request.prompt is not None and not (chat and tokenizer.chat_template):
        return encode(tokenizer, request.prompt)
    return tuple(tokenizer(chat_text(tokenizer, request), add_special_tokens=False)["input_ids"])


def traced_tokens(tokenizer: Any, request: UserRequest) -> tuple[int, ...]:
    """Synthetic tokens for a request of which only the hashes of its blocks are known."""
    length, ids = request.input_length or 0, request.hash_ids
    block = block_tokens(length, len(ids), request.block_size)
    return synthetic_tokens(ids, length, block, tokenizer.vocab_size, tokenizer.all_special_ids)


def chat_text(tokenizer: Any, request: UserRequest) -> str:
    """The prompt that the chat template makes of the messages, or of the prompt as a user's message; with its own
    special tokens.

    Raises `BadInput` when the tokenizer has no chat template, or that refuses the messages.
    """
    if not tokenizer.chat_template:
        raise BadInput("messages, but this model's tokenizer has no chat template")
    messages: list[Any] = list(request.messages) or [{"role": "user", "content": request.prompt}]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tools=list(request.tools) or None, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is the model's own code, and asks of messages what it likes
        raise BadInput(f"the chat template refuses the messages: {error}") from None
    return text
