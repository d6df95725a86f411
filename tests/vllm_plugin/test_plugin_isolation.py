"""Who may share pages with whom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from engines import LOSSY, Engine, engine, near_prefix

from jointkv.vllm_plugin.tracking import TrackedRequest, isolation_key, takes_part


@pytest.fixture(scope="module")
def fused(calm: Path) -> Iterator[Engine]:
    with engine(calm, fusion=LOSSY) as served:
        yield served
        served.assert_drained()


@pytest.fixture(scope="module")
def strict(calm: Path) -> Iterator[Engine]:
    with engine(calm, fusion={**LOSSY, "isolation": "strict"}) as served:
        yield served
        served.assert_drained()


def merged_by(served: Engine, seed: int, options: list[dict[str, Any]]) -> int:
    """Blocks merged among requests of one text, one after each of `options`."""
    before = served.statistics["blocks_merged"]
    for prompt, option in zip(near_prefix(len(options), shared=320, seed=seed), options, strict=True):
        served.submit(prompt, 4, **option)
    served.finish()
    assert served.statistics["faults"] == 0
    return served.statistics["blocks_merged"] - before


@pytest.mark.parametrize(
    ("seed", "first", "second", "merges"),
    [
        (1, "red", "red", True),
        (2, "red", "blue", False),
        (3, "red", None, False),
        (4, None, "red", False),
        (5, None, None, True),
    ],
)
def test_salts(fused: Engine, seed: int, first: str | None, second: str | None, merges: bool) -> None:
    assert (merged_by(fused, seed, [{"salt": first}, {"salt": second}]) > 0) is merges


def test_who_opts_out_neither_merges_nor_serves(fused: Engine) -> None:
    alone = {"extra": {"jointkv": False}}
    assert merged_by(fused, 11, [alone, {}]) == 0
    assert merged_by(fused, 12, [{}, alone]) == 0
    assert merged_by(fused, 13, [{"extra": {"jointkv": True}}, {"extra": {"other": 1}}]) > 0


def test_strict_isolation_wants_a_salt(strict: Engine) -> None:
    assert merged_by(strict, 21, [{}, {}]) == 0
    assert strict.statistics["isolation_refusals"] == 2 * ((320 + 36 + 3) // 32)
    assert strict.statistics["state"] == "inert"
    assert merged_by(strict, 22, [{"salt": "red"}, {"salt": "red"}]) > 0
    assert merged_by(strict, 23, [{"salt": "red"}, {"salt": "blue"}]) == 0


def stand_in(**more: Any) -> Any:
    fields: dict[str, Any] = {
        "cache_salt": None,
        "lora_request": None,
        "mm_features": [],
        "sampling_params": SimpleNamespace(extra_args=None),
        "prompt_embeds": None,
        "prompt_token_ids": [1],
        "resumable": False,
        "num_preemptions": 0,
    }
    return SimpleNamespace(**{**fields, **more})


def image(identifier: str, offset: int, length: int) -> Any:
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


DIFFERENT = [
    stand_in(),
    stand_in(cache_salt=""),
    stand_in(cache_salt="red"),
    stand_in(lora_request=SimpleNamespace(lora_name="red", lora_int_id=1)),
    stand_in(lora_request=SimpleNamespace(lora_name="red", lora_int_id=2)),
    stand_in(lora_request=SimpleNamespace(lora_name="blue", lora_int_id=1)),
    stand_in(mm_features=[image("a", 0, 10)]),
    stand_in(mm_features=[image("b", 0, 10)]),
    stand_in(mm_features=[image("a", 4, 10)]),
    stand_in(mm_features=[image("a", 0, 9)]),
    stand_in(mm_features=[image("a", 0, 10), image("b", 20, 10)]),
    stand_in(mm_features=[image("b", 20, 10), image("a", 0, 10)]),
]


def test_the_isolation_key_tells_all_of_these_apart() -> None:
    assert len({isolation_key(request) for request in DIFFERENT}) == len(DIFFERENT)


def test_the_isolation_key_of_equal_requests_is_equal() -> None:
    features = [[image("a", 0, 10)], [image("a", 0, 10)]]
    adapters = [SimpleNamespace(lora_name="red", lora_int_id=1) for _ in range(2)]
    first, second = (
        stand_in(cache_salt="red", lora_request=adapter, mm_features=feature)
        for adapter, feature in zip(adapters, features, strict=True)
    )
    assert isolation_key(first) == isolation_key(second)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"sampling_params": None}, True),
        ({"sampling_params": SimpleNamespace(extra_args={"jointkv": True})}, True),
        ({"sampling_params": SimpleNamespace(extra_args={"jointkv": False})}, False),
        ({"prompt_embeds": object()}, False),
        ({"prompt_token_ids": None}, False),
        ({"resumable": True}, False),
    ],
)
def test_takes_part(changes: dict[str, Any], expected: bool) -> None:
    assert takes_part(stand_in(**changes)) is expected


def test_hashes_are_taken_once_until_the_restart() -> None:
    request = stand_in(all_token_ids=list(range(100)), num_preemptions=3)
    tracked = TrackedRequest(request, None)
    first = tracked.take_hashes(2, 32)
    assert len(first) == 2 and tracked.next_slot == 2
    assert len(tracked.take_hashes(3, 32)) == 1
    tracked.served |= {(0, 0), (0, 1)}
    tracked.restart(kept=1)
    assert (tracked.epoch, tracked.next_slot, tracked.served) == (3, 1, {(0, 0)})
    assert tracked.take_hashes(2, 32) == first[1:]
    tracked.restart(kept=0)
    assert tracked.served == set() and tracked.take_hashes(2, 32) == first
