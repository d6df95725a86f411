"""Reading a user's requests from a JSONL file, with every fault named by file and line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointkv.errors import BadInput

TEXT_FIELDS = ("prompt", "text", "question")
MESSAGES_FIELD = "messages"


@dataclass(frozen=True)
class UserRequest:
    """One line of a user's file: either a prompt, or messages that the caller's chat template turns into one.

    Exactly one of the two is set: `messages` is empty when `prompt` is a string, and `prompt` is None when
    there are messages. Messages are as in the file (at least `role` and `content`), to be handed to
    `tokenizer.apply_chat_template`. `line` counts from 1.
    """

    line: int
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()


def read_requests(path: str | Path) -> list[UserRequest]:
    """The requests in a JSONL file: per line an object with `prompt`, `text`, `question` or `messages`.

    If a line has several of these fields the first in this order counts. Blank lines are skipped, other
    fields ignored. Raises `BadInput`, as `file:line: reason`, for a file that has no request, and for a line
    that is not UTF-8, is no JSON object, has none of the fields, or whose prompt or messages are empty or
    malformed; as `file: reason` for a file that cannot be read.
    """
    path = Path(path)
    requests: list[UserRequest] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    requests.append(_read_line(line, number, f"{path}:{number}"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    if not requests:
        raise BadInput(f"{path}:1: the file has no request")
    return requests


def _read_line(line: bytes, number: int, where: str) -> UserRequest:
    row = _parse(line, where)
    for field in TEXT_FIELDS:
        if row.get(field) is not None:
            return UserRequest(number, prompt=_check_text(row[field], f"{where}: {field!r}"))
    if row.get(MESSAGES_FIELD) is not None:
        return UserRequest(number, messages=_check_messages(row[MESSAGES_FIELD], where))
    fields = ", ".join(repr(field) for field in (*TEXT_FIELDS, MESSAGES_FIELD))
    raise BadInput(f"{where}: none of the fields {fields}; found: {', '.join(map(repr, row)) or 'no field'}")


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


def _check_text(value: object, what: str) -> str:
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
            _check_text(message[field], f"{where}: message {index}: {field!r}")
    return tuple(value)


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
