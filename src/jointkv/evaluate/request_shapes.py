"""The fields that count of an entry, in whichever of the known shapes it comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from jointkv.errors import BadInput
from jointkv.evaluate.jsonl import Text, validated

TEXT_FIELDS = ("prompt", "text", "question")
CHAT_FIELDS = ("messages", "conversations")
BLOCKS_FIELD = "hash_ids"
ANSWER_FIELDS = ("answer", "completion", "response", "output")
_NOT_OF_A_PROMPT = (*CHAT_FIELDS, BLOCKS_FIELD, "tools", "system")


class _Turn(BaseModel):
    speaker: Annotated[str, Field(alias="from")] = ""
    value: Text


class _Conversation(BaseModel):
    conversations: list[_Turn] = Field(min_length=2)


def fields_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an entry, without those that do not count; see `iter_requests` for the shapes.

    Raises `BadInput` for an entry in none of them.
    """
    known = (*TEXT_FIELDS, *CHAT_FIELDS, BLOCKS_FIELD)
    if isinstance(row.get("body"), Mapping) and not any(name in row for name in known):
        row = {**row, **row["body"]}
    fields = {name: value for name, value in row.items() if value is not None}
    fields.pop("from_conversation", None)
    for name in ANSWER_FIELDS:
        if not (isinstance(fields.get(name), str) and fields[name].strip()):
            fields.pop(name, None)
    if any(name in fields for name in TEXT_FIELDS):
        return {name: value for name, value in fields.items() if name not in _NOT_OF_A_PROMPT}
    if fields.get("messages", []) != []:
        return {name: value for name, value in fields.items() if name != BLOCKS_FIELD}
    if "conversations" in fields:
        return _conversation(fields)
    if BLOCKS_FIELD in fields:
        return _timed_blocks({name: value for name, value in fields.items() if name not in ("tools", "system")})
    found = ", ".join(map(repr, row)) or "no field"
    raise BadInput(f"none of the fields {', '.join(map(repr, known))}; found: {found}")


def _conversation(fields: dict[str, Any]) -> dict[str, Any]:
    turns = validated(_Conversation.model_validate, fields).conversations
    system = turns.pop(0) if turns[0].speaker == "system" else None
    if len(turns) < 2:
        raise BadInput("conversations: a question and an answer expected after the turn of the system")
    prompt, answer = (turn.value for turn in turns[:2])
    kept = {name: value for name, value in fields.items() if name not in (*_NOT_OF_A_PROMPT, *ANSWER_FIELDS)}
    asked: dict[str, Any] = {"prompt": prompt}
    if system is not None:
        said = (("system", system.value), ("user", prompt))
        asked = {"messages": [{"role": role, "content": content} for role, content in said]}
    return {**kept, **asked, "answer": answer, "from_conversation": True}


def _timed_blocks(fields: dict[str, Any]) -> dict[str, Any]:
    """Traces in Mooncake's form count milliseconds; those in Qwen's, which name a chat, seconds."""
    when = fields.get("timestamp")
    if isinstance(when, int | float) and not isinstance(when, bool) and "chat_id" not in fields:
        fields["timestamp"] = when / 1000
    return fields
