"""Hashes of blocks become tokens that repeat as the blocks do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.block_traces import block_tokens, synthetic_tokens
from jointkv.evaluate.request_files import LoggedRequest, Unusable, iter_requests


def made(ids: list[int | str], tokens: int, block: int) -> tuple[int, ...]:
    return synthetic_tokens(ids, tokens, block, 100, [0, 1, 7])


def test_equal_blocks_hold_equal_tokens() -> None:
    one, other = made([5, "a", 6], 40, 16), made([5, "b", 6], 48, 16)
    assert len(one) == 40 and one[:16] == other[:16] and one[16:32] != other[16:32] and one[32:] == other[32:40]
    assert not {0, 1, 7} & {*one, *other} and max(one) < 100
    assert made([5], 3, 3) == one[:3]


@pytest.mark.parametrize(
    ("tokens", "blocks", "size"), [(6955, 14, 512), (521, 33, 16), (513, 2, 512), (17, 2, 16), (9, 1, 9)]
)
def test_the_size_of_a_block_follows_from_the_lengths(tokens: int, blocks: int, size: int) -> None:
    assert block_tokens(tokens, blocks) == size


def test_a_size_that_is_no_power_of_two_must_be_said() -> None:
    with pytest.raises(BadInput, match="hash_ids: 10 blocks, and input_length 700"):
        block_tokens(700, 10)
    assert block_tokens(700, 10, 70) == 70
    with pytest.raises(BadInput, match="'block_size'"):
        block_tokens(700, 10, 100)


def read(path: Path, row: dict[str, Any]) -> LoggedRequest | Unusable:
    path.write_text(json.dumps(row))
    return next(iter(iter_requests(path, LoggedRequest)))


def test_milliseconds_and_seconds(tmp_path: Path) -> None:
    row = {"timestamp": 1500, "input_length": 20, "output_length": 3, "hash_ids": [1, 2]}
    kinds = (row, {**row, "timestamp": 1.5, "chat_id": 4, "parent_chat_id": -1, "turn": 1})
    found = [read(tmp_path / "trace.jsonl", each) for each in kinds]
    assert all(isinstance(each, LoggedRequest) and each.output_tokens == 3 for each in found)
    assert {each.timestamp.timestamp() for each in found} == {1.5}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input_length": None}, "input_length: Field required beside hash_ids"),
        ({"input_length": 0}, "input_length: .* greater than or equal to 1"),
        ({"input_length": 10**15}, "input_length: .* less than or equal to"),
        ({"hash_ids": []}, "hash_ids: is empty"),
        ({"hash_ids": [1.5, 2]}, "hash_ids.0"),
        ({"hash_ids": [1, 2, 3, 4]}, "no power of two"),
    ],
)
def test_faults_are_named_by_field(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    row = {"input_length": 20, "output_length": 3, "hash_ids": [1, 2], **change}
    found = read(tmp_path / "trace.jsonl", row)
    assert isinstance(found, Unusable)
    assert re.search(reason, found.reason)
