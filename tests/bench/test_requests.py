"""Requests from traffics and files: token ids that fit, and a reason for what does not."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from jointkv.bench.request_files import from_file
from jointkv.bench.requests import Limits, Workload, from_traffic
from jointkv.errors import BadInput
from jointkv.evaluate.traffic.gsm8k import load_problems

LIMITS = Limits(model_tokens=2000, pool_blocks=100, block_size=16)
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ message.role }} says {{ message.content }} {% endfor %}"
)


def words() -> PreTrainedTokenizerFast:
    """One token a word or sign."""
    raw = RawTokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    raw.train_from_iterator([problem.worked for problem in load_problems()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZER = words()


def read(path: Path, rows: list[Any], **given: Any) -> Workload:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    settings: dict[str, Any] = {"count": None, "output_tokens": None, "default_output_tokens": 9, "limits": LIMITS}
    return from_file(path, TOKENIZER, **{**settings, **given})


def test_traffic() -> None:
    made = from_traffic("near-prefix", TOKENIZER, 3, 7, 0, LIMITS)
    assert made.name == "near_prefix" and "session" in made.description
    assert len({request.prompt for request in made.requests}) == 3
    assert all(request.output_tokens == 7 and request.timestamp is None for request in made.requests)
    assert made == from_traffic("near_prefix", TOKENIZER, 3, 7, 0, LIMITS)
    assert made != from_traffic("near_prefix", TOKENIZER, 3, 7, 1, LIMITS)


def test_turns_keep_their_session_and_their_tenant(tmp_path: Path) -> None:
    made = from_traffic("agent_turns_clock", TOKENIZER, 6, 7, 0, Limits(None, 10_000, 16))
    assert len({request.session for request in made.requests}) == 2
    assert {request.salt for request in made.requests} == {"tenant-0", "tenant-1"}
    assert made.requests[0].think == 0 and made.requests[-1].think > 0 and made.requests[0].timestamp is None
    rows = [{"prompt": "How", "session_id": "a", "cache_salt": "x"}, {"prompt": "many", "session_id": 7}]
    found = [(request.session, request.salt) for request in read(tmp_path / "log.jsonl", rows).requests]
    assert found == [("a", "x"), (7, None)]


def test_a_trace_of_block_hashes_repeats_as_its_blocks_do(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 2500, "input_length": 40, "output_length": 3, "hash_ids": [1, 2, 3]},
        {"timestamp": 1000, "input_length": 48, "output_length": 4, "hash_ids": [1, 2, 4]},
    ]
    first, second = read(tmp_path / "trace.jsonl", rows, timed=True).requests
    assert (first.timestamp, second.timestamp) == (0.0, 1.5) and (first.output_tokens, second.output_tokens) == (4, 3)
    assert first.prompt[:32] == second.prompt[:32] and first.prompt[32:40] != second.prompt[32:]


def test_a_data_set_says_what_it_is() -> None:
    made = from_traffic("dataset:GSM8K", TOKENIZER, 2, 7, 0, LIMITS)
    assert made.name == "dataset:GSM8K" and made.description.startswith("GSM8K, ")


def test_traffic_that_does_not_fit() -> None:
    with pytest.raises(BadInput, match="the model reads 300"):
        from_traffic("near_prefix", TOKENIZER, 2, 7, 0, Limits(300, 100, 16))
    with pytest.raises(BadInput, match="there are 10"):
        from_traffic("near_prefix", TOKENIZER, 2, 7, 0, Limits(None, 10, 16))
    with pytest.raises(BadInput, match="unknown traffic"):
        from_traffic("nonsense", TOKENIZER, 2, 7, 0, LIMITS)


def test_the_pool_keeps_one_block() -> None:
    (request,) = from_traffic("random_tokens", TOKENIZER, 1, 16, 0, Limits(None, 66, 16)).requests
    assert request.tokens == 65 * 16
    assert Limits(None, 65, 16).problem(request) is not None
    assert Limits(65 * 16, 66, 16).problem(request) is None
    assert Limits(65 * 16 - 1, 66, 16).problem(request) is not None


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")
@pytest.mark.parametrize(("name", "tokens"), [("random", 1024), ("prefix_repetition", 512)])
def test_data_of_vllm(name: str, tokens: int) -> None:
    made = from_traffic(name, TOKENIZER, 12, 4, 3, LIMITS)
    assert len(made.requests) == 12
    # Text that is tokenized again, as the server does it, need not keep its length.
    assert all(abs(len(request.prompt) - tokens) <= tokens / 8 for request in made.requests)
    assert made == from_traffic(name, TOKENIZER, 12, 4, 3, LIMITS)
    starts = {request.prompt[:64] for request in made.requests}
    assert len(starts) == 12 if name == "random" else len(starts) <= 10


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="needs vllm not to be there")
def test_data_of_vllm_needs_vllm() -> None:
    with pytest.raises(ModuleNotFoundError):
        from_traffic("random", TOKENIZER, 2, 4, 0, LIMITS)


def test_lines(tmp_path: Path) -> None:
    rows = [
        {"prompt": "How many apples ?", "other": [1]},
        {"text": "How many", "max_tokens": 3},
        {"question": "How", "output_tokens": 4, "answer": "many"},
        {"prompt": "How", "completion": "5 apples ."},
        {"prompt": "How", "output": {"no": "text"}},
    ]
    made = read(tmp_path / "mine.jsonl", rows)
    assert (made.name, made.description) == ("mine", "5 of 5 requests of mine.jsonl")
    assert [len(request.prompt) for request in made.requests] == [4, 2, 1, 1, 1]
    assert [request.output_tokens for request in made.requests] == [9, 3, 4, 3, 9]
    assert TOKENIZER.decode(list(made.requests[1].prompt)) == "How many"
    forced = read(tmp_path / "mine.jsonl", rows, output_tokens=6, count=2)
    assert [request.output_tokens for request in forced.requests] == [6, 6]
    assert forced.description == "2 of 5 requests of mine.jsonl"


def test_messages(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "How many ?"}, {"role": "assistant", "content": "5 apples"}
    tool = {"role": "tool", "content": "5"}
    made = read(tmp_path / "chat.jsonl", [{"messages": [user]}, {"messages": [user, assistant]}, {"messages": [tool]}])
    assert [len(request.prompt) for request in made.requests] == [5, 5]
    assert [request.output_tokens for request in made.requests] == [9, 2]
    assert made.description.endswith(
        "1 could not be used, the first at line 3: the chat template refuses the messages: no tools"
    )


def test_bad_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = ["{", "", {"prompt": ""}, {"prompt": "How many"}, {"prompt": "How " * 3000}, {"prompt": 3}]
    made = read(tmp_path / "mine.jsonl", rows)
    assert len(made.requests) == 1
    assert made.description.startswith("1 of 5 requests of mine.jsonl; 4 could not be used, the first at line 1: ")


def test_a_file_without_a_valid_request_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    with pytest.raises(BadInput) as error:
        read(path, ["nonsense", {"promt": "How"}, {"messages": [{"role": "user"}]}, {"prompt": 1}])
    message = str(error.value)
    assert "line 1: not JSON" in message and "line 2: none of the fields 'prompt'" in message
    assert "line 3: messages.0.content: Field required" in message and "line 4" not in message
    with pytest.raises(BadInput, match="it is empty"):
        read(path, [])
    with pytest.raises(BadInput, match="cannot be read"):
        from_file(tmp_path / "missing.jsonl", TOKENIZER, None, None, 9, LIMITS)
    with pytest.raises(BadInput, match="the model reads 2000"):
        read(path, [{"prompt": "How " * 3000}])


def test_a_log_keeps_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    rows = [
        {"prompt": "How", "timestamp": "2024-05-01T12:00:10Z"},
        {"prompt": "How many", "timestamp": "2024-05-01T12:00:07.5"},
        {"prompt": "How many apples", "timestamp": "2024-05-01T14:00:08+02:00"},
        {"prompt": "without"},
    ]
    made = read(tmp_path / "log.jsonl", rows, timed=True)
    assert [(len(request.prompt), request.timestamp) for request in made.requests] == [(2, 0.0), (3, 0.5), (1, 2.5)]
    assert "line 4: no 'timestamp'" in made.description
    monkeypatch.undo()
    time.tzset()
    seconds = [{"prompt": "How", "timestamp": when} for when in (3.25, 1, 1.5)]
    made = read(tmp_path / "log.jsonl", seconds, timed=True)
    assert [request.timestamp for request in made.requests] == [0.0, 0.5, 2.25]
    assert [request.timestamp for request in read(tmp_path / "log.jsonl", seconds).requests] == [None] * 3


def test_sharegpt(tmp_path: Path) -> None:
    def turns(*texts: str) -> dict[str, Any]:
        return {"id": "x", "conversations": [{"from": "human", "value": text} for text in texts]}

    talks = [
        turns("How many apples are there ?", "There are 5 apples in it .", "more", "no"),
        turns("How many ?", "5"),
        turns("How many apples are there ?"),
        {"items": []},
    ]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(talks, indent=1))
    made = from_file(path, TOKENIZER, None, None, 9, LIMITS)
    assert [(len(request.prompt), request.output_tokens) for request in made.requests] == [(6, 7)]
    assert made.description.startswith("1 of 4 requests of talks.json; 3 could not be used, the first at item 1: ")
    path.write_text("[{")
    with pytest.raises(BadInput, match="not JSON"):
        from_file(path, TOKENIZER, None, None, 9, LIMITS)
