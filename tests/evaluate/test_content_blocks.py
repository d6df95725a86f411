"""Requests in the form of Anthropic's API are read as those of OpenAI's that say the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.request_files import read_requests

BODY = {
    "model": "m",
    "max_tokens": 5,
    "system": [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Now."},
    ],
    "tools": [{"name": "add", "description": "adds", "input_schema": {"type": "object"}}],
    "messages": [
        {"role": "user", "content": "What is 2 + 3?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I add.", "signature": "x"},
                {"type": "text", "text": "I add them."},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2, "b": 3}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "5"}]}],
        },
    ],
}


def read(path: Path, row: Any) -> Any:
    path.write_text(json.dumps(row))
    return read_requests(path)[0]


def test_system_tools_calls_results_and_thoughts(tmp_path: Path) -> None:
    for row in (BODY, {"custom_id": "a", "body": BODY}):
        found = read(tmp_path / "log.jsonl", row)
        system, user, assistant, tool = found.messages
        assert system == {"role": "system", "content": "Be brief.\nNow."} and found.system is None
        assert user["content"] == "What is 2 + 3?"
        assert assistant["content"] == "I add them." and assistant["reasoning_content"] == "I add."
        assert assistant["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 3}}
        assert (tool["role"], tool["content"]) == ("tool", "5")
        function = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
        assert found.tools == ({"type": "function", "function": function},)


def test_a_result_without_content_and_one_beside_text(tmp_path: Path) -> None:
    results = [{"type": "tool_result", "tool_use_id": "a"}, {"type": "tool_result", "tool_use_id": "b", "content": "7"}]
    said = [*results, {"type": "text", "text": "Go on."}]
    found = read(tmp_path / "log.jsonl", {"messages": [{"role": "user", "content": said}], "system": "Hi."})
    assert (found.messages[1]["role"], found.messages[1]["content"]) == ("user", "\n7\nGo on.")


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image", "source": {}}, "content.1 is of type 'image'"),
        ({"type": "tool_result", "content": [{"type": "image"}]}, "content.1 is of type 'image'"),
        ({"type": "text"}, "content.1.text: Field required"),
    ],
)
def test_faults_are_named(part: dict[str, Any], reason: str, tmp_path: Path) -> None:
    said = [{"type": "thinking", "thinking": "."}, part]
    with pytest.raises(BadInput, match=rf"log\.jsonl:1: messages\.0\.{reason}|messages\.0.*{reason}"):
        read(tmp_path / "log.jsonl", {"messages": [{"role": "user", "content": said}]})


def test_a_system_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="system: Input should be a valid string"):
        read(tmp_path / "log.jsonl", {"messages": [{"role": "user", "content": "a"}], "system": 3})
