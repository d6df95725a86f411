"""Load files, logs to replay, users' JSONL, and the files of data sets."""

from __future__ import annotations

import csv
import io
import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jointkv.bench.request_files import from_file
from jointkv.bench.requests import Limits
from jointkv.errors import BadInput
from jointkv.evaluate.datasets import Dataset, get_dataset
from jointkv.evaluate.request_files import read_requests
from tests.effort import fuzz_settings
from tests.fuzz.damage import PROMISE, TEXTS, damaged_bytes, json_bytes, promise, slower, unreadable

LIMITS = Limits(model_tokens=2000, pool_blocks=100, block_size=16)
MESSAGES = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
LINES: tuple[dict[str, Any], ...] = (
    {"prompt": "one two three", "output_tokens": 4, "answer": "yes", "timestamp": 12.5},
    {"messages": MESSAGES, "max_tokens": 3, "timestamp": "2026-01-02T03:04:05+01:00"},
    {"question": "why", "completion": "because", "timestamp": "2026-01-02"},
    {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, CALLS],
        "tools": [{"type": "function"}],
    },
    {
        "conversations": [
            {"from": "system", "value": "a"},
            {"from": "human", "value": "b"},
            {"from": "gpt", "value": "c"},
        ]
    },
)
CONVERSATION = {
    "id": "1",
    "conversations": [{"from": "human", "value": "a b c d e"}, {"from": "gpt", "value": "f g h i"}],
}
ROWS: dict[str, dict[str, Any]] = {
    "HelpSteer": {"chosen": [{"content": "a", "role": "user"}, {"content": "b", "role": "assistant"}]},
    "Synthetic Therapy Conversations": {"turns": ["a", "b"]},
    "GSM8K": {"question": "a", "answer": "b\n#### 1,200"},
    "LongBench qmsum": {"prompt": "a", "answers": ["b"]},
    "RULER niah_multikey_3": {"input": "a", "outputs": ["b"]},
}


class Words:
    """A tokenizer of words that is quick, and raises where a text could not be encoded."""

    bos_token_id = None
    chat_template = "given"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        text.encode()
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return " ".join(f"{message['role']} {message['content']}" for message in messages)


def lines(*rows: Any) -> st.SearchStrategy[bytes]:
    """JSONL in which some lines are damaged, and some line ends too."""
    line = st.sampled_from(rows).flatmap(lambda row: st.just(json.dumps(row).encode()) | json_bytes(row))
    return st.tuples(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r"]), st.lists(line, max_size=4)).map(
        lambda made: made[0].join(made[1])
    )


@pytest.mark.hazard("Parsers", "a damaged or hostile file of requests or log to replay", PROMISE)
@fuzz_settings()
@given(
    text=lines(*LINES) | json_bytes([CONVERSATION, CONVERSATION]),
    timed=st.booleans(),
    count=st.none() | st.integers(1, 3),
    given_length=st.none() | st.integers(1, 5),
)
def test_files_of_requests(
    tmp_path: Path, text: bytes, timed: bool, count: int | None, given_length: int | None
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(text)
    with promise():
        made = from_file(path, Words(), count, given_length, 9, LIMITS, timed=timed)
        assert made.requests and all(LIMITS.problem(request) is None for request in made.requests)
        times = [request.timestamp for request in made.requests]
        assert times[0] == 0 and times == sorted(times) if timed else set(times) == {None}


@pytest.mark.hazard("Parsers", "a damaged or hostile JSONL file of prompts", PROMISE)
@fuzz_settings()
@given(text=lines(*LINES))
def test_prompts(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text)
    with promise():
        for request in read_requests(path):
            assert (request.prompt is None) == bool(request.messages)
            Words()(request.prompt or request.messages[0]["content"])
            Words()(request.answer or "")


@cache
def sound_csv() -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([["a question", "one", "two, three", "4", 'five "5"', "C"]] * 3)
    return text.getvalue().encode()


@pytest.mark.hazard("Parsers", "a damaged or hostile file of a data set", PROMISE)
@slower(4)
@given(name=st.sampled_from([*ROWS, "MMLU"]), data=st.data())
def test_data_sets(tmp_path: Path, name: str, data: st.DataObject) -> None:
    dataset: Dataset = get_dataset(name)
    path = tmp_path / "rows"
    if name == "MMLU":
        path.write_bytes(data.draw(damaged_bytes(sound_csv()) | st.binary(max_size=40)))
    else:
        path.write_bytes(data.draw(lines(ROWS[name])))
    with promise():
        for row in islice(dataset.local_rows(path), 10):
            assert row.text.strip() and all(isinstance(answer, str) for answer in row.answers)


@pytest.mark.hazard("Parsers", "a damaged or hostile file of requests or log to replay", PROMISE)
def test_requests_that_are_no_files(tmp_path: Path) -> None:
    for path in unreadable(tmp_path)[:-1]:
        with pytest.raises(BadInput):
            read_requests(path)
        with pytest.raises(BadInput):
            from_file(path, Words(), None, None, 9, LIMITS)


@pytest.mark.hazard("Parsers", "wrong or hostile options on the command line", PROMISE)
@fuzz_settings()
@given(name=TEXTS | TEXTS.map("dataset:{}".format))
def test_names_of_data_sets(name: str) -> None:
    with promise():
        assert get_dataset(name.removeprefix("dataset:")).name
