"""Chat logs, conversations, plain text, Parquet and data sets of the hub are read by one reader, as documented."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate import request_sources
from jointkv.evaluate.datasets.hub import Hub, HubUnavailable
from jointkv.evaluate.request_files import prompts_of, read_requests
from tests.evaluate.toy_tokenizers import word_level

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": ""},
    {"role": "user", "content": [{"type": "text", "text": "Is it"}, {"type": "text", "text": "cold?"}], "name": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "c1", "content": ""},
]
READ = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "Is it\ncold?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": ""},
]
TURNS = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}, {"from": "human", "value": "Oh."}]
TEMPLATE = (
    "{% for tool in tools or [] %}has {{ tool.function.name }} {% endfor %}"
    "{% for message in messages %}{{ message.role + ' ' + message.content }} "
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments.city }} {% endfor %}{% endfor %}"
)


def written(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_chat_log_with_tools_is_what_templates_take(tmp_path: Path) -> None:
    rows = [{"messages": CHAT, "tools": [TOOL]}, {"messages": CHAT, "tools": json.dumps([TOOL])}]
    batch = {"custom_id": "7", "method": "POST", "body": {"model": "m", "messages": CHAT, "tools": [TOOL]}}
    for request in read_requests(written(tmp_path / "log.jsonl", *rows, batch)):
        assert list(request.messages) == READ and request.tools == (TOOL,) and request.answer is None


def test_the_chat_template_is_applied_with_tools(tmp_path: Path) -> None:
    tokenizer = word_level()
    tokenizer.chat_template = TEMPLATE
    path = written(tmp_path / "log.jsonl", {"messages": CHAT, "tools": [TOOL]}, {"messages": CHAT, "tools": []})
    texts = []

    class Recording:
        chat_template = TEMPLATE
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: str, add_special_tokens: bool) -> Mapping[str, list[int]]:
            texts.append(text)
            return {"input_ids": [1]}

    prompts_of(Recording(), read_requests(path))
    assert texts == [
        "has weather system  user Is it\ncold? assistant  Oslo tool  ",
        texts[0].removeprefix("has weather "),
    ]


def test_what_the_assistant_said_last_is_the_answer(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "Yes."}
    path = written(
        tmp_path / "log.jsonl", {"messages": [*CHAT, said]}, {"messages": CHAT[:3], "answer": "x"}, {"messages": [said]}
    )
    first, second, alone = read_requests(path)
    assert (len(first.messages), first.answer) == (4, "Yes.")
    assert (len(second.messages), second.answer) == (2, "x"), "a call of a tool is no text"
    assert (len(alone.messages), alone.answer) == (1, None)


@pytest.mark.parametrize("array", [True, False])
def test_conversations_of_sharegpt(tmp_path: Path, array: bool) -> None:
    system = {"from": "system", "value": "Be brief."}
    rows = [{"id": "a", "conversations": TURNS}, {"conversations": [system, *TURNS], "answer": "not this"}]
    path = tmp_path / "talks.json"
    if array:
        path.write_text(json.dumps(rows, indent=1))
    else:
        written(path, *rows)
    plain, prompted = read_requests(path)
    assert (plain.prompt, plain.answer, plain.messages) == ("Why?", "So.", ())
    assert [message["content"] for message in prompted.messages] == ["Be brief.", "Why?"]
    assert prompted.answer == "So." and prompted.from_conversation and prompted.prompt is None
    assert str(prompted.place) == f"{path}: item 1" if array else f"{path}:2"


def test_an_array_of_any_entries(tmp_path: Path) -> None:
    path = tmp_path / "requests.json"
    path.write_text(json.dumps([{"prompt": "a"}, {"messages": CHAT}]))
    assert [request.prompt for request in read_requests(path)] == ["a", None]
    path.write_text("[3]")
    with pytest.raises(BadInput, match=r"requests\.json: item 0: an object with fields expected"):
        read_requests(path)


def test_every_line_of_plain_text_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf[1] Why?\r\n\r\n{not JSON\n")
    assert [(request.prompt, request.place.number) for request in read_requests(path)] == [
        ("[1] Why?", 1),
        ("{not JSON", 3),
    ]
    assert len(read_requests(path, 1)) == 1
    path.write_bytes(b"good\n\xff\n")
    with pytest.raises(BadInput, match=r"prompts\.txt:2: not UTF-8 at byte 1"):
        read_requests(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    # A column has one type: text has no parts here, and what a message lacks is null.
    chat = [{**message, "content": read["content"] or None} for message, read in zip(CHAT, READ, strict=True)]
    chat[0]["content"] = chat[3]["content"] = ""
    rows = [{"prompt": "a", "messages": None}, {"prompt": None, "messages": chat}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "log.parquet")
    plain, talk = read_requests(tmp_path / "log.parquet")
    assert plain.prompt == "a" and list(talk.messages) == READ and talk.place.within == "row 2"
    (tmp_path / "log.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BadInput, match=r"log\.parquet: cannot be read as Parquet"):
        read_requests(tmp_path / "log.parquet")
    with pytest.raises(BadInput, match=r"none\.parquet: cannot be read"):
        read_requests(tmp_path / "none.parquet")


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Hub, int | None]] = []

    def fetch(hub: Hub, count: int | None, wanted: Any, *, offline: bool) -> list[Mapping[str, Any]]:
        asked.append((hub, count))
        return [{"question": "a"}, {"question": "b"}][:count]

    monkeypatch.setattr(request_sources, "fetch_records", fetch)
    assert [request.prompt for request in read_requests("hub:some/set", 1)] == ["a"]
    # A command line makes a path of it.
    assert len(read_requests(Path("hub:some/set:main:test"))) == 2
    assert asked == [(Hub("some/set", None, "train"), 1), (Hub("some/set", "main", "test"), None)]
    for name in ("hub:", "hub:set", "hub:a/b/c", "hub:a/", "hub:a/b:", "hub:a/b:c:d:e"):
        with pytest.raises(BadInput, match="no data set of the hub"):
            read_requests(name)

    def refuse(*_: Any, **__: Any) -> list[Mapping[str, Any]]:
        raise HubUnavailable("no network")

    monkeypatch.setattr(request_sources, "fetch_records", refuse)
    with pytest.raises(BadInput, match="hub:some/set: no network; download a file of it"):
        read_requests("hub:some/set")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content: is empty"),
        ({"messages": [{"role": "tool"}]}, "messages.0.content: Field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0: content.0 is of type 'image_url'; only text",
        ),
        (
            {"messages": [{"role": "user", "content": ["a", {"type": "text"}]}]},
            "messages.0: content.1.text: Field required",
        ),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages.0: content.0"),
        ({"messages": CHAT, "tools": "weather"}, "tools: is a string that is not JSON"),
        ({"messages": CHAT, "tools": ["weather"]}, "tools.0: Input should be a valid dictionary"),
        ({"conversations": TURNS[:1]}, "conversations: List should have at least 2 items"),
        ({"conversations": [{"from": "system", "value": "s"}, TURNS[0]]}, "conversations: a question and an answer"),
        ({"conversations": [{"from": "human"}, TURNS[1]]}, "conversations.0.value: Field required"),
    ],
)
def test_faults_are_named_by_file_line_and_field(tmp_path: Path, row: Any, reason: str) -> None:
    with pytest.raises(BadInput) as refusal:
        read_requests(written(tmp_path / "log.jsonl", {"prompt": "good"}, row))
    assert str(refusal.value).startswith(f"{tmp_path / 'log.jsonl'}:2: {reason}")


def test_whatever_a_template_does_is_a_named_refusal(tmp_path: Path) -> None:
    tokenizer = word_level()
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(BadInput, match=r"log\.jsonl:1: the chat template refuses the messages"):
        prompts_of(tokenizer, read_requests(written(tmp_path / "log.jsonl", {"messages": CHAT})))
