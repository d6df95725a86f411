"""Messages of a chat as logs hold them, in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationInfo
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from jointkv.errors import BadInput
from jointkv.evaluate.content_blocks import Numbered, as_function, without_blocks
from jointkv.evaluate.jsonl import Encodable, Text, check_not_empty, validated

TEXT_PARTS = ("text", "input_text", "output_text")


class _TextPart(TypedDict):
    type: Literal["text", "input_text", "output_text"]
    text: Encodable


def _said_by(content: str, info: ValidationInfo) -> str:
    # A user who says nothing asks nothing. A call of a tool, its result and a system prompt may well be empty.
    return check_not_empty(content) if info.data.get("role") == "user" else content


class _Message(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    role: Text
    content: Annotated[Encodable, AfterValidator(_said_by)]


def _as_templates_take_it(given: Any) -> Any:
    """Content as one string, arguments of calls as objects, and nothing that is null."""
    if not isinstance(given, Mapping):
        return given
    message = {name: value for name, value in given.items() if value is not None}
    if isinstance(message.get("content"), list):
        message, parts = without_blocks(message)
        message["content"] = _joined(parts)
    calls = message.get("tool_calls")
    if calls or message.get("function_call") or ("content" in given and message.get("role") == "assistant"):
        message.setdefault("content", "")
    if isinstance(calls, list):
        message["tool_calls"] = [_with_objects(call) for call in calls]
    return message


def _joined(parts: Iterable[Numbered]) -> str:
    return "\n".join(_part(number, part) for number, part in parts)


def _system(given: Any) -> Any:
    return _joined(enumerate(given)) if isinstance(given, list) else given


def _part(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind is not None and kind not in TEXT_PARTS:
        raise PydanticCustomError(
            "part", "content.{number} is of type {kind}; only text can be read", locals() | {"kind": repr(kind)}
        )
    try:
        return validated(_PART.validate_python, part)["text"]
    except BadInput as error:
        raise PydanticCustomError("part", "content.{number}.{error}", {"number": number, "error": str(error)}) from None


def _with_objects(call: Any) -> Any:
    """`call` with its arguments as an object where they are JSON in a string, as the API of OpenAI has them."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _tools(given: Any) -> Any:
    """Data sets hold a list of tools as a string of JSON too."""
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else ()
        except (ValueError, RecursionError):
            raise PydanticCustomError("tools", "is a string that is not JSON") from None
    return [as_function(tool) for tool in given] if isinstance(given, list) else given


_PART = TypeAdapter(_TextPart)
Message = Annotated[_Message, BeforeValidator(_as_templates_take_it)]
"""One message for `tokenizer.apply_chat_template`; whatever else it holds is kept."""
Tools = Annotated[tuple[dict[str, Any], ...], BeforeValidator(_tools)]
"""Descriptions of tools for the same."""
System = Annotated[Encodable | None, BeforeValidator(_system)]
"""What stands before all messages, where a log has it apart from them: text, or parts of text."""
