"""Requests from a user's file: JSONL of prompts or messages, a log with timestamps, JSON in ShareGPT's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, Field, StringConstraints, ValidationError

from jointkv.bench.requests import Limits, ServingRequest, Workload
from jointkv.errors import BadInput
from jointkv.evaluate.traffic.base import encode
from jointkv.evaluate.traffic.jsonl import ANSWER_FIELDS, TEXT_FIELDS

SHOWN = 3
FEWEST_TOKENS = 4
"""Of a prompt and an answer in ShareGPT's format, as in vLLM's benchmark; shorter ones are mostly broken."""

Model = TypeVar("Model", bound=BaseModel)
Text = Annotated[str, StringConstraints(min_length=1, strict=True)]


class _Message(BaseModel):
    role: Text
    content: Text


class _Line(BaseModel):
    """One request of a JSONL file; other fields are ignored."""

    prompt: Text | None = Field(None, validation_alias=AliasChoices(*TEXT_FIELDS))
    messages: list[_Message] = Field(default_factory=list)
    output_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("output_tokens", "max_tokens"))
    answer: Any = Field(None, validation_alias=AliasChoices(*ANSWER_FIELDS))
    timestamp: datetime | None = None


class _Turn(BaseModel):
    value: Text


class _Conversation(BaseModel):
    conversations: list[_Turn] = Field(min_length=2)


class _Skipped(Exception):
    """Why one request of a file is not used."""


def from_file(
    path: Path,
    tokenizer: Any,
    count: int | None,
    output_tokens: int | None,
    default_output_tokens: int,
    limits: Limits,
    *,
    timed: bool = False,
) -> Workload:
    """The first `count` requests (None: all) of a file that can be used; others before them are counted.

    A JSONL file has on each line `prompt`, `text` or `question`, or else `messages` in roles; then `output_tokens` or
    `max_tokens`, or an answer whose length counts, or as last message one of the assistant; and with `timed` a
    `timestamp`, in seconds or ISO 8601 (without a zone: UTC). A file that begins with `[` is in ShareGPT's format; of
    each conversation the first turn is the prompt and the second the answer, as in vLLM's benchmark.

    Args:
        tokenizer: of the `transformers` library.
        output_tokens: for all requests, whatever the file says.
        default_output_tokens: where neither that nor the file says anything.

    Raises:
        BadInput: the file cannot be read, or has no request that can be used; says what is wrong with the first ones.
    """
    read = _read_conversation if _is_array(path) else _read_line
    requests: list[ServingRequest] = []
    wrong: list[str] = []
    total = 0
    for where, text in _entries(path, read is _read_conversation):
        total += 1
        if count is not None and len(requests) == count:
            continue
        try:
            request = read(text, tokenizer, output_tokens, default_output_tokens)
            if timed and request.timestamp is None:
                raise _Skipped("no 'timestamp'")
            if (problem := limits.problem(request)) is not None:
                raise _Skipped(problem)
        except _Skipped as reason:
            wrong.append(f"{where}: {reason}")
        else:
            requests.append(request if timed else replace(request, timestamp=None))
    if not requests:
        raise BadInput(f"{path}: no request that can be used; {'; '.join(wrong[:SHOWN]) or 'it is empty'}")
    if timed:
        requests = _from_zero(requests)
    description = f"{len(requests)} of {total} requests of {path.name}"
    if wrong:
        description += f"; {len(wrong)} could not be used, the first at {wrong[0]}"
    return Workload(path.stem, description, tuple(requests))


def _is_array(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except (OSError, ValueError) as error:  # no such file, or no name of one
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _entries(path: Path, array: bool) -> Iterator[tuple[str, Any]]:
    """Place of every request, and its JSON, or what that stands for where the file is one array. Raises `BadInput`."""
    if array:
        try:
            entries = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: not JSON: {error}") from None
        for number, entry in enumerate(entries):
            yield f"item {number}", entry
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if stripped := line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield f"line {number}", stripped


def _read_line(text: bytes, tokenizer: Any, output_tokens: int | None, default: int) -> ServingRequest:
    line = _validated(_Line.model_validate_json, text)
    answer = line.answer if isinstance(line.answer, str) else None
    if line.prompt is not None:
        prompt = encode(tokenizer, line.prompt)
    elif line.messages:
        messages = [message.model_dump() for message in line.messages]
        if len(messages) > 1 and messages[-1]["role"] == "assistant":
            answer = messages.pop()["content"]
        prompt = _chat_tokens(tokenizer, messages)
    else:
        raise _Skipped(f"none of the fields {', '.join(map(repr, TEXT_FIELDS))}, 'messages'")
    length = output_tokens or line.output_tokens or (_length(tokenizer, answer) if answer else 0) or default
    when = line.timestamp
    if when is not None and when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return ServingRequest(prompt, length, None if when is None else when.timestamp())


def _read_conversation(entry: Any, tokenizer: Any, output_tokens: int | None, default: int) -> ServingRequest:
    first, second = _validated(_Conversation.model_validate, entry).conversations[:2]
    prompt = encode(tokenizer, first.value)
    length = _length(tokenizer, second.value)
    if min(len(prompt), length) < FEWEST_TOKENS:
        raise _Skipped(f"a prompt of {len(prompt)} tokens and an answer of {length}; {FEWEST_TOKENS} are the least")
    return ServingRequest(prompt, output_tokens or length)


def _validated(validate: Callable[[Any], Model], given: Any) -> Model:
    """Raises `_Skipped` with the first thing that is wrong."""
    try:
        return validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        # A request is one line to whoever reads it here.
        message = problem["msg"].replace(" at line 1 column", " at column")
        raise _Skipped(f"{where}: {message}" if where else message) from None


def _chat_tokens(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[int, ...]:
    if not tokenizer.chat_template:
        raise _Skipped("messages, but this model's tokenizer has no chat template")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise _Skipped(f"the chat template refuses the messages: {error}") from None
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _from_zero(requests: list[ServingRequest]) -> list[ServingRequest]:
    """By time, the first at 0."""
    timed = sorted((request.timestamp or 0.0, place) for place, request in enumerate(requests))
    return [replace(requests[place], timestamp=when - timed[0][0]) for when, place in timed]
