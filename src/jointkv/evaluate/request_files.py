"""Requests of users: prompts, messages with tools, or conversations, from any of the sources that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, Field, TypeAdapter

from jointkv.errors import BadInput
from jointkv.evaluate.jsonl import Text, located, validated
from jointkv.evaluate.messages import Message, Tools
from jointkv.evaluate.request_sources import Entry, Place, entries
from jointkv.evaluate.traffic.base import encode

TEXT_FIELDS = ("prompt", "text", "question")
CHAT_FIELDS = ("messages", "conversations")
ANSWER_FIELDS = ("answer", "completion", "response", "output")


@dataclass(frozen=True)
class UserRequest:
    """One request of a user: either a prompt, or messages that the model's chat template turns into one.

    Exactly one of the two is set: `messages` is empty when `prompt` is a string, and `prompt` is None when there are
    messages.

    Attributes:
        place: where it stands, or the number of a prompt that was given otherwise.
        tools: descriptions that go to the chat template with the messages.
        answer: the text that truly followed, None where there is none.
        from_conversation: whether it comes from a conversation in ShareGPT's format.
    """

    place: Place
    prompt: Annotated[Text | None, Field(validation_alias=AliasChoices(*TEXT_FIELDS))] = None
    messages: tuple[Message, ...] = ()
    tools: Tools = ()
    answer: Annotated[Text | None, Field(validation_alias=AliasChoices(*ANSWER_FIELDS))] = None
    from_conversation: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class LoggedRequest(UserRequest):
    """A request of a log, with how much was generated for it and when it came, where the log says so."""

    output_tokens: Annotated[
        int | None, Field(ge=1, validation_alias=AliasChoices("output_tokens", "max_tokens", "max_completion_tokens"))
    ] = None
    timestamp: datetime | None = None


@dataclass(frozen=True)
class Unusable:
    """A place of which no request can be made, and why."""

    place: Place
    reason: str


Kind = TypeVar("Kind", bound=UserRequest)


class _Turn(BaseModel):
    speaker: Annotated[str, Field(alias="from")] = ""
    value: Text


class _Conversation(BaseModel):
    conversations: list[_Turn] = Field(min_length=2)


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
    else `conversations` in ShareGPT's format; the first of these in this order counts. A request to OpenAI's batch API
    is in `body`. The true continuation is the first of `answer`, `completion`, `response` and `output` that holds a
    string with text. Where the last of several messages is the assistant's, it is the true continuation instead, and
    no part of the prompt. Of a conversation the first turn is the prompt and the second the answer, as in vLLM's
    benchmark; a turn of the system before them goes with the prompt. Other fields are ignored, but for those of `kind`.

    Raises `BadInput` for a source that cannot be read, or is no JSON as a whole.
    """
    adapter = TypeAdapter(kind)
    for entry in entries(source, count):
        try:
            given = {**_fields(entry), "place": entry.place}
            yield _without_answer(validated(adapter.validate_python, given))
        except BadInput as error:
            yield Unusable(entry.place, str(error))


def _fields(entry: Entry) -> dict[str, Any]:
    """The fields of an entry, without those that do not count."""
    row = entry.fields()
    known = (*TEXT_FIELDS, *CHAT_FIELDS)
    if isinstance(row.get("body"), Mapping) and not any(name in row for name in known):
        row = {**row, **row["body"]}
    fields = {name: value for name, value in row.items() if value is not None}
    fields.pop("from_conversation", None)
    for name in ANSWER_FIELDS:
        if not (isinstance(fields.get(name), str) and fields[name].strip()):
            fields.pop(name, None)
    if any(name in fields for name in TEXT_FIELDS):
        return {name: value for name, value in fields.items() if name not in (*CHAT_FIELDS, "tools")}
    if fields.get("messages", []) != []:
        return fields
    if "conversations" in fields:
        return _conversation(fields)
    found = ", ".join(map(repr, row)) or "no field"
    raise BadInput(f"none of the fields {', '.join(map(repr, known))}; found: {found}")


def _conversation(fields: dict[str, Any]) -> dict[str, Any]:
    turns = validated(_Conversation.model_validate, fields).conversations
    system = turns.pop(0) if turns[0].speaker == "system" else None
    if len(turns) < 2:
        raise BadInput("conversations: a question and an answer expected after the turn of the system")
    prompt, answer = (turn.value for turn in turns[:2])
    kept = {name: value for name, value in fields.items() if name not in (*CHAT_FIELDS, *ANSWER_FIELDS)}
    asked: dict[str, Any] = {"prompt": prompt}
    if system is not None:
        said = (("system", system.value), ("user", prompt))
        asked = {"messages": [{"role": role, "content": content} for role, content in said]}
    return {**kept, **asked, "answer": answer, "from_conversation": True}


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
    if request.prompt is not None and not (chat and tokenizer.chat_template):
        return encode(tokenizer, request.prompt)
    if not tokenizer.chat_template:
        raise BadInput("messages, but this model's tokenizer has no chat template")
    messages: list[Any] = list(request.messages) or [{"role": "user", "content": request.prompt}]
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=list(request.tools) or None, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is the model's own code, and asks of messages what it likes
        raise BadInput(f"the chat template refuses the messages: {error}") from None
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
