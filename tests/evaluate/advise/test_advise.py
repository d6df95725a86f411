"""Advice on logs whose fault is known: found, named, and worth what following it brings."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.advise.result import Advice
from jointkv.evaluate.advise.run import Settings, advise
from jointkv.evaluate.traffic import get_traffic
from jointkv.evaluate.traffic.writing import as_row
from tests.cli.commands import TEMPLATE
from tests.evaluate.toy_tokenizers import MAKERS


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = MAKERS["single_digits"]()
    made.chat_template = TEMPLATE
    return made


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def on(path: Path, tokenizer: Any, **settings: Any) -> Advice:
    return advise(path, "toy", tokenizer, Settings(**settings), lambda done: None)


def agents(name: str, tokenizer: Any, path: Path, count: int = 12) -> Advice:
    made = get_traffic(name).requests(tokenizer, count, continuation_tokens=1)
    return on(write(path, [as_row(each, number, "m", 8) for number, each in enumerate(made)]), tokenizer)


@pytest.fixture(scope="module")
def without(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Advice:
    """Of agents whose prefixes nothing breaks."""
    return agents("agent_turns", tokenizer, tmp_path_factory.mktemp("log") / "log.jsonl")


def test_following_the_advice_brings_what_it_says(without: Advice, tokenizer: Any, tmp_path: Path) -> None:
    behind = agents("agent_turns_nonce", tokenizer, tmp_path / "log.jsonl")
    assert behind.exact_tokens == 0 and behind.same_tokens > 0.8 * without.exact_tokens
    (found,) = behind.breaks
    assert (found.says, found.requests, found.anchor) == ("a 12-digit number", 10, "<system>Request ")
    assert behind.exact_tokens + found.gain == pytest.approx(without.exact_tokens, rel=0.03)
    assert behind.tenants == 2 and not without.breaks


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("agent_turns_clock", "a clock"),
        ("agent_turns_tools", "tools in another order"),
        ("agent_turns_thoughts", "a thought stripped"),
    ],
)
def test_what_breaks_the_prefix_of_agents(
    name: str, says: str, without: Advice, tokenizer: Any, tmp_path: Path
) -> None:
    found = agents(name, tokenizer, tmp_path / "log.jsonl")
    assert found.breaks[0].says == says and found.breaks[0].gain > 0
    assert [each.says for each in found.breaks].count(says) == 1
    if "thoughts" not in name:  # other prompts than without them
        assert found.exact_tokens + found.gain == pytest.approx(without.exact_tokens, rel=0.05)


def test_a_log_without_anything_in_common(tokenizer: Any, tmp_path: Path) -> None:
    words = ("ship", "sea", "clock", "bread", "salt", "wind", "coin", "silk", "radio", "glass", "paper", "toy")
    rows = [{"prompt": " ".join(random.Random(seed).choices(words, k=200))} for seed in range(4)]
    found = on(write(tmp_path / "log.jsonl", rows), tokenizer)
    assert (found.exact_tokens, found.same_tokens, found.gain, found.breaks) == (0, 0, 0, [])
    assert found.new_tokens + found.moved_tokens == found.tokens


def test_bad_entries_are_named_or_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a b c"}, '{"prompt": "half', {"prompt": 3}, {"messages": [{"role": "user"}]}, {"prompt": "d"}]
    path = write(tmp_path / "log.jsonl", rows)
    with pytest.raises(BadInput, match=r"log\.jsonl:2: not JSON: .* --skip-bad"):
        on(path, tokenizer)
    found = on(path, tokenizer, skip_bad=True)
    assert (found.requests, found.unusable) == (2, 3)
    assert [reason.split(":")[0] for reason in found.reasons] == ["line 2", "line 3", "line 4"]
    assert "messages.0.content" in found.reasons[2]
    with pytest.raises(BadInput, match="no request that can be used; line 1"):
        on(write(path, ["{"]), tokenizer, skip_bad=True)
    with pytest.raises(BadInput, match="even number"):
        on(path, tokenizer, block_size=15)


def test_tools_that_the_chat_template_leaves_out_are_a_caution(tokenizer: Any, tmp_path: Path) -> None:
    said = {"messages": [{"role": "user", "content": "Hi"}], "timestamp": "02/Mar/2026:09:14:07"}
    rows = [{**said, "tools": [{"name": "add", "input_schema": {}}]}, said]
    found = on(write(tmp_path / "log.jsonl", rows), tokenizer)
    assert (found.requests, found.without_tools) == (2, 1) and "leaves out the tools of 1 requests" in found.cautions[0]


def test_a_trace_of_block_hashes_needs_no_text(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"timestamp": 27482, "input_length": 150, "output_length": 9, "hash_ids": [1, 2, 3, 4, 5]},
        {"timestamp": 27999, "input_length": 140, "output_length": 9, "hash_ids": [1, 2, 3, 4, 9]},
        {"timestamp": 28999, "input_length": 150, "output_length": 9, "hash_ids": [7, 2, 3, 4, 5]},
    ]
    found = on(write(tmp_path / "trace.jsonl", rows), tokenizer)
    assert (found.tokens, found.exact_tokens) == (440, 128)
    assert found.same_tokens == 5 * 16 + 16 * 1 and found.breaks[0].kind == "blocks"
