"""How result files are read, and which results may be put together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from jointkv.errors import BadInput

R = TypeVar("R", bound=BaseModel)


def read_result(path: Path, kinds: Iterable[type[R]]) -> R:
    """The result in `path`, which names the format of one of `kinds`.

    Raises `BadInput`, which starts with the path and names the field, for a file that is none of them or is damaged.
    """
    formats = {kind.model_fields["format"].default: kind for kind in kinds}
    try:
        text = path.read_text(encoding="utf-8")
        named = json.loads(text, parse_constant=_refuse)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    name = named.get("format") if isinstance(named, dict) else None
    if not isinstance(name, str) or name not in formats:
        expected = f"{'one of ' if len(formats) > 1 else ''}{', '.join(formats)}"
        raise BadInput(f'{path}: "format" is {json.dumps(name)[:60]}, expected {expected}')
    try:
        return formats[name].model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def conflict(one: Mapping[str, object], other: Mapping[str, object]) -> str | None:
    """The first condition that both have and that differs, with both values; None if there is none."""
    differ = (name for name in one if name in other and one[name] != other[name])
    return next((f"{name} {one[name]} and {other[name]}" for name in differ), None)
