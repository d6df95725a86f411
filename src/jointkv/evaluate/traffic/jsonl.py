"""Reading a user's requests from a JSONL file, with every fault named by file and line."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointkv.errors import BadInput

TEXT_FIELDS = ("prompt", "text", "question")
MESSAGES_FIELD = "messages"
ANSWER_FIELDS = ("answer", "completion", "response", "output")


@dataclass(frozen=True)
class UserRequest:
    """One line of a user's file: either a prompt, or messages that the caller's chat template turns into one.

    Exactly one of the two is set: `messages` is empty when `prompt` is a string, and `prompt` is None when
    there are messages. Messages are as in the file (at least `role` and `content`), to be handed to
    `tokenizer.apply_chat_template`. `answer` is the text that truly followed, None where the line has none.
    `line` counts from 1.
    """

    line: int
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class Record:
    """One object of a JSONL file; `where` is its `file:line`, and `line` counts from 1."""

    fields: Mapping[str, Any]
    line: int
    where: str


def read_requests(path: str | Path) -> list[UserRequest]:
    """The requests in a JSONL file: per line an object with `prompt`, `text`, `question` or `messages`.

    If a line has several of these fields the first in this order counts. The true continuation is the first of
    `answer`, `completion`, `response` and `output` that holds a string with text; one of another type is no
    continuation and is ignored, as are other fields. Raises `BadInput` as `read_records` does, and, as
    `file:line: reason`, for a line that has none of the fields, or whose prompt or messages are empty or malformed.
    """
    return [_read_request(record) for record in read_records(path)]


def read_records(path: str | Path) -> Iterator[Record]:
    """The objects of a JSONL file, one a line; blank lines are skipped.

    Raises `BadInput`, as `file:line: reason`, for a file without any, and for a line that is not UTF-8 or no JSON
    object; as `file: reason` for a file that cannot be read.
    """
    path = Path(path)
    empty = True
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    where = f"{path}:{number}"
                    empty = False
                    yield Record(_parse(line, where), number, where)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    if empty:
        raise BadInput(f"{path}:1: the file has no request")


def _read_request(record: Record) -> UserRequest:
    row, where = record.fields, record.where
    answer = _read_answer(row, where)
    for field in TEXT_FIELDS:
        if row.get(field) is not None:
            return UserRequest(record.line, prompt=check_text(row[field], f"{where}: {field!r}"), answer=answer)
    if row.get(MESSAGES_FIELD) is not None:
        return UserRequest(record.line, messages=_check_messages(row[MESSAGES_FIELD], where), answer=answer)
    fields = ", ".join(repr(field) for field in (*TEXT_FIELDS, MESSAGES_FIELD))
    raise BadInput(f"{where}: none of the fields {fields}; found: {', '.join(map(repr, row)) or 'no field'}")


def _read_answer(row: Mapping[str, Any], where: str) -> str | None:
    for field in ANSWER_FIELDS:
        value = row.get(field)
        if isinstance(value, str) and value.strip():
            return check_text(value, f"{where}: {field!r}")
    return None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not UTF-8 at byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits and very deep nesting are JSON, but Python refuses them.
        raise BadInput(f"{where}: JSON that cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise BadInput(f"{where}: a JSON object expected, found {_json_type(row)}")
    return row


def check_text(value: object, what: str) -> str:
    """`value` if it is a string with text that UTF-8 can hold. Raises `BadInput`, which starts with `what`."""
    if not isinstance(value, str):
        raise BadInput(f"{what} must be a string, found {_json_type(value)}")
    if not value.strip():
        raise BadInput(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"{what} has half a surrogate pair at character {error.start + 1}") from error
    return value


def _check_messages(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list):
        raise BadInput(f"{where}: {MESSAGES_FIELD!r} must be an array, found {_json_type(value)}")
    if not value:
        raise BadInput(f"{where}: {MESSAGES_FIELD!r} is empty")
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadInput(f"{where}: message {index} must be an object, found {_json_type(message)}")
        for field in ("role", "content"):
            if field not in message:
                raise BadInput(f"{where}: message {index} has no {field!r}")
            check_text(message[field], f"{where}: message {index}: {field!r}")
    return tuple(value)


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
