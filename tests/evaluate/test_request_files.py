"""Users' JSONL files are read as documented, and every fault is named by file and line."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.errors import BadInput
from jointkv.evaluate.request_files import UserRequest, read_requests
from jointkv.evaluate.request_sources import Place

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Bo"}]


def at(path: Path, line: int) -> Place:
    return Place(str(path), "line", line)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.jsonl"


def test_each_kind_of_line(path: Path) -> None:
    rows = [{"prompt": "a", "id": 7}, {"text": "b"}, {"question": "c", "answer": "d"}, {"messages": MESSAGES}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_requests(path) == [
        UserRequest(at(path, 1), prompt="a"),
        UserRequest(at(path, 2), prompt="b"),
        UserRequest(at(path, 3), prompt="c", answer="d"),
        UserRequest(at(path, 4), messages=tuple(MESSAGES)),
    ]
    assert read_requests(str(path)) == read_requests(path)


def test_first_of_several_fields_counts_and_null_does_not(path: Path) -> None:
    path.write_text(
        '{"messages": [], "question": "c", "prompt": "a"}\n{"prompt": null, "text": "b"}\n', encoding="utf-8"
    )
    assert [request.prompt for request in read_requests(path)] == ["a", "b"]


@pytest.mark.parametrize("field", ["answer", "completion", "response", "output"])
def test_true_continuation(path: Path, field: str) -> None:
    rows = [{"prompt": "a", field: " b\n"}, {"messages": MESSAGES, field: "c"}, {"prompt": "a", "outputs": "c"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [request.answer for request in read_requests(path)] == [" b\n", "c", None]


def test_first_continuation_that_is_text_counts(path: Path) -> None:
    rows = [
        {"prompt": "a", "output": "4", "completion": "2", "response": "3"},
        {"prompt": "a", "answer": 72, "completion": None, "response": " ", "output": "4"},
        {"prompt": "a", "answer": ["x"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [request.answer for request in read_requests(path)] == ["2", "4", None]


def test_byte_order_mark_windows_line_ends_and_blank_lines(path: Path) -> None:
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \r\n{"prompt": "b\xc3\xa9"}\r\n')
    assert read_requests(path) == [UserRequest(at(path, 1), prompt="a"), UserRequest(at(path, 4), prompt="bé")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a"', r"not JSON: Expecting ',' delimiter at column 15"),
        (b"hello", "not JSON: Expecting value at column 1"),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 13 of the line"),
        (b'{"prompt": %s}' % (b"9" * 5000), "JSON that cannot be read"),
        (b"[" * 100_000, "JSON that cannot be read|not JSON"),
        (b'["a"]', "a JSON object expected, found array"),
        (b'"a"', "a JSON object expected, found string"),
        (b"null", "a JSON object expected, found null"),
        (b"true", "a JSON object expected, found boolean"),
        (b"3.5", "a JSON object expected, found number"),
        (
            b"{}",
            "none of the fields 'prompt', 'text', 'question', 'messages', 'conversations', 'hash_ids'; found: no field",
        ),
        (b'{"promt": "a", "id": 1}', "none of the fields .*; found: 'promt', 'id'"),
        (b'{"prompt": null}', "none of the fields .*; found: 'prompt'"),
        (b'{"prompt": ["a"]}', "prompt: Input should be a valid string"),
        (b'{"text": 3}', "text: Input should be a valid string"),
        (b'{"prompt": " \\n "}', "prompt: is empty"),
        (b'{"question": ""}', "question: is empty"),
        (b'{"prompt": "ab\\ud800"}', "prompt: has half a surrogate pair at character 3"),
        (b'{"prompt": "a", "answer": "b\\ud800"}', "answer: has half a surrogate pair at character 2"),
        (b'{"messages": "a"}', "messages: Input should be a valid tuple"),
        (b'{"messages": []}', "none of the fields .*; found: 'messages'"),
        (b'{"messages": ["a"]}', "messages.0: Input should be a valid dictionary"),
        (b'{"messages": [{"content": "a"}]}', "messages.0.role: Field required"),
        (b'{"messages": [{"role": "user"}]}', "messages.0.content: Field required"),
        (b'{"messages": [{"role": 1, "content": "a"}]}', "messages.0.role: Input should be a valid string"),
        (b'{"messages": [{"role": "user", "content": ""}]}', "messages.0.content: is empty"),
    ],
)
def test_faults_are_named_by_file_and_line(path: Path, line: bytes, reason: str) -> None:
    path.write_bytes(b'{"prompt": "good"}\n\n' + line + b"\n")
    with pytest.raises(BadInput, match=rf"requests\.jsonl:3: ({reason})") as refusal:
        read_requests(path)
    assert str(refusal.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_empty_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"requests\.jsonl:1: the file has no request"):
        read_requests(path)


def test_file_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"requests\.jsonl: cannot be read: No such file"):
        read_requests(path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_requests(tmp_path)


PROMPTS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@settings(max_examples=50)
@given(prompts=st.lists(PROMPTS, min_size=1, max_size=5), ascii_only=st.booleans())
def test_any_prompts_come_back(tmp_path_factory: pytest.TempPathFactory, prompts: list[str], ascii_only: bool) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "requests.jsonl"
    lines = (json.dumps({"prompt": prompt}, ensure_ascii=ascii_only) + "\n" for prompt in prompts)
    path.write_bytes("".join(lines).encode("utf-8"))
    assert read_requests(path) == [UserRequest(at(path, line), prompt=p) for line, p in enumerate(prompts, start=1)]


@settings(max_examples=100)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_by_name(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "requests.jsonl"
    path.write_bytes(content)
    try:
        assert read_requests(path)
    except BadInput as refusal:
        assert str(refusal).startswith(f"{path}:")
