"""Reading JSONL: one object a line, its fields checked, every fault named by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError

from jointkv.errors import BadInput

T = TypeVar("T")
_BLANK = b"\xef\xbb\xbf \t\r\n"


def check_not_empty(value: str) -> str:
    """`value`, for pydantic. Raises its error when there is nothing but blanks."""
    if not value.strip():
        raise PydanticCustomError("empty", "is empty")
    return value


def _check_encodable(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        place = {"place": error.start + 1}
        raise PydanticCustomError("surrogate", "has half a surrogate pair at character {place}", place) from None
    return value


Encodable = Annotated[str, StringConstraints(strict=True), AfterValidator(_check_encodable)]
"""A string that UTF-8 can hold."""

Text = Annotated[Encodable, AfterValidator(check_not_empty)]
"""A string with text that UTF-8 can hold."""


@dataclass(frozen=True)
class JsonLine:
    """One object of a JSONL file; `where` is its `file:line`, and `number` counts from 1."""

    fields: Mapping[str, Any]
    number: int
    where: str


def read_records(path: str | Path) -> Iterator[JsonLine]:
    """The objects of a JSONL file, one a line; blank lines are skipped.

    Raises `BadInput`, as `file:line: reason`, for a file without any, and for a line that is not UTF-8 or no JSON
    object; as `file: reason` for a file that cannot be read.
    """
    empty = True
    for number, line in read_lines(path):
        empty, where = False, f"{path}:{number}"
        with located(where):
            row = parse_object(line)
        yield JsonLine(row, number, where)
    if empty:
        raise BadInput(f"{path}:1: the file has no request")


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a file that are not blank, with their numbers. Raises `BadInput` when it cannot be read."""
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip(_BLANK):
                    yield number, line
    except (OSError, ValueError) as error:  # no such file, or no name of one
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object in `line`. Raises `BadInput`."""
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits and very deep nesting are JSON, but Python refuses them.
        raise BadInput(f"JSON that cannot be read: {error}") from None
    if not isinstance(row, dict):
        kinds = {list: "array", str: "string", bool: "boolean", type(None): "null"}
        raise BadInput(f"a JSON object expected, found {kinds.get(type(row), 'number')}")
    return row


def validated(validate: Callable[[Any], T], given: Any) -> T:
    """What a validator of pydantic makes of `given`. Raises `BadInput` with the first thing that is wrong."""
    try:
        return validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise BadInput(f"{where}: {problem['msg']}" if where else problem["msg"]) from None


@contextmanager
def located(where: str) -> Iterator[None]:
    """A `BadInput` raised in the block is raised again as `where: reason`."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
