"""Messages of Anthropic's API, whose content holds calls, results and thoughts as blocks, as templates take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CALL, RESULT, THOUGHT, HIDDEN_THOUGHT = "tool_use", "tool_result", "thinking", "redacted_thinking"
KINDS = (CALL, RESULT, THOUGHT, HIDDEN_THOUGHT)

Numbered = tuple[int, Any]
"""A part of a message's content, and its place there."""


def without_blocks(message: Mapping[str, Any]) -> tuple[dict[str, Any], list[Numbered]]:
    """A message in OpenAI's form but for its content, and the parts of that, which is a list.

    Calls of tools go to `tool_calls`, thoughts to `reasoning_content`, and a message that has nothing but results of
    tools is one of the role `tool`. One message stays one message.
    """
    made, parts = dict(message), list(enumerate(message["content"]))
    calls = [_call(part) for _, part in parts if _kind(part) == CALL]
    thoughts = [str(part.get("thinking", "")) for _, part in parts if _kind(part) == THOUGHT]
    if calls:
        made["tool_calls"] = [*made.get("tool_calls", ()), *calls]
    if thoughts:
        made.setdefault("reasoning_content", "\n".join(thoughts))
    if parts and all(_kind(part) == RESULT for _, part in parts):
        made["role"] = "tool"
    return made, list(_text_parts(parts))


def as_function(tool: Any) -> Any:
    """The description of a tool as OpenAI's API has it."""
    if not isinstance(tool, Mapping) or "input_schema" not in tool:
        return tool
    function = {name: tool[name] for name in ("name", "description") if name in tool}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else None


def _call(part: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": part.get("name"), "arguments": part.get("input", {})}
    return {"id": part.get("id"), "type": "function", "function": function}


def _text_parts(parts: Sequence[Numbered]) -> Iterator[Numbered]:
    for number, part in parts:
        if _kind(part) == RESULT:
            content = part.get("content") or ""
            yield from ((number, each) for each in (content if isinstance(content, list) else [content]))
        elif _kind(part) not in KINDS:
            yield number, part
