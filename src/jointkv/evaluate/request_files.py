"""Requests from a user's file: JSONL of prompts or messages, logs with timestamps, JSON in ShareGPT's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from jointkv.errors import BadInput
from jointkv.evaluate.jsonl import Text, located, parse_object, read_lines, validated
from jointkv.evaluate.traffic.base import encode

TEXT_FIELDS = ("prompt", "text", "question")
ANSWER_FIELDS = ("answer", "completion", "response", "output")


class Message(TypedDict):
    """One message for `tokenizer.apply_chat_template`; whatever else it holds is kept."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    role: Text
    content: Text


@dataclass(frozen=True)
class UserRequest:
    """One request of a user's file: either a prompt, or messages that the caller's chat template turns into one.

    Exactly one of the two is set: `messages` is empty when `prompt` is a string, and `prompt` is None when there are
    messages. `answer` is the text that truly followed, None where the file has none. `line` counts from 1; in
    ShareGPT's format it is the number of the item, from 0.
    """

    line: int
    prompt: Annotated[Text | None, Field(validation_alias=AliasChoices(*TEXT_FIELDS))] = None
    messages: tuple[Message, ...] = ()
    answer: Annotated[Text | None, Field(validation_alias=AliasChoices(*ANSWER_FIELDS))] = None


@dataclass(frozen=True)
class LoggedRequest(UserRequest):
    """A request of a log, with how much was generated for it and when it came, where the log says so."""

    output_tokens: Annotated[int | None, Field(ge=1, validation_alias=AliasChoices("output_tokens", "max_tokens"))] = (
        None
    )
    timestamp: datetime | None = None


@dataclass(frozen=True)
class Unusable:
    """A place of a file, such as `line 3`, and why no request can be made of what stands there."""

    place: str
    reason: str


Kind = TypeVar("Kind", bound=UserRequest)


class _Turn(BaseModel):
    value: Text


class _Conversation(BaseModel):
    conversations: list[_Turn] = Field(min_length=2)


def read_requests(path: str | Path) -> list[UserRequest]:
    """The requests of a file, all of which must be usable; see `iter_requests`.

    Raises `BadInput`, as `file:line: reason`, for the first that is not, and for a file without any; as `file: reason`
    for one that cannot be read.
    """
    found = []
    for request in iter_requests(Path(path), UserRequest):
        if isinstance(request, Unusable):
            raise BadInput(f"{path}:{request.place.removeprefix('line ')}: {request.reason}")
        found.append(request)
    if not found:
        raise BadInput(f"{path}:1: the file has no request")
    return found


def iter_requests(path: Path, kind: type[Kind]) -> Iterator[Kind | Unusable]:
    """What stands at each place of a file, in order: a request, or why it is none.

    A JSONL file has on each line an object with `prompt`, `text` or `question`, or else `messages` in roles; the first
    of these in this order counts. The true continuation is the first of `answer`, `completion`, `response` and
    `output` that holds a string with text. Other fields are ignored, but for those of `kind`. A file that begins with
    `[` is in ShareGPT's format: the first turn of a conversation is the prompt, and the second the answer.

    Raises `BadInput` for a file that cannot be read, or is no JSON as a whole.
    """
    adapter = TypeAdapter(kind)
    read: Callable[[Any], Mapping[str, Any]]
    if is_sharegpt(path):
        name, entries, read = "item", _items(path), _conversation
    else:
        name, entries, read = "line", read_lines(path), _fields
    for number, entry in entries:
        try:
            yield validated(adapter.validate_python, {**read(entry), "line": number})
        except BadInput as error:
            yield Unusable(f"{name} {number}", str(error))


def is_sharegpt(path: Path) -> bool:
    """Whether the file is one JSON array, as in ShareGPT's format. Raises `BadInput` when it cannot be read."""
    _, first = next(read_lines(path), (0, b""))
    return first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _items(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON: {error}") from None


def _conversation(entry: Any) -> dict[str, Any]:
    prompt, answer = validated(_Conversation.model_validate, entry).conversations[:2]
    return {"prompt": prompt.value, "answer": answer.value}


def _fields(line: bytes) -> dict[str, Any]:
    """The fields of a line, without those that do not count."""
    row = parse_object(line)
    fields = {name: value for name, value in row.items() if value is not None}
    for name in ANSWER_FIELDS:
        if not (isinstance(fields.get(name), str) and fields[name].strip()):
            fields.pop(name, None)
    if any(name in fields for name in TEXT_FIELDS):
        fields.pop("messages", None)
    elif fields.get("messages", []) == []:
        asked = ", ".join(map(repr, (*TEXT_FIELDS, "messages")))
        raise BadInput(f"none of the fields {asked}; found: {', '.join(map(repr, row)) or 'no field'}")
    return fields


def prompts_of(tokenizer: Any, requests: Sequence[UserRequest], *, chat: bool = False) -> list[list[int]]:
    """`prompt_tokens` of each of `requests`. Raises `BadInput`, which names the line."""
    rows = []
    for request in requests:
        with located(f"line {request.line}"):
            rows.append(list(prompt_tokens(tokenizer, request, chat=chat)))
    return rows


def prompt_tokens(tokenizer: Any, request: UserRequest, *, chat: bool = False) -> tuple[int, ...]:
    """Token ids to prefill for `request`; with `chat` a plain prompt becomes a user message where possible.

    Raises `BadInput` when there are messages and the tokenizer has no chat template, or refuses them.
    """
    if request.prompt is not None and not (chat and tokenizer.chat_template):
        return encode(tokenizer, request.prompt)
    if not tokenizer.chat_template:
        raise BadInput("messages, but this model's tokenizer has no chat template")
    from jinja2 import TemplateError

    messages: list[Any] = list(request.messages) or [{"role": "user", "content": request.prompt}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise BadInput(f"the chat template refuses the messages: {error}") from None
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
