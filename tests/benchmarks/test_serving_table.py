"""The serving table: what `jointkv bench serve` is asked for, for which traffics, and what is kept of its answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main

import serving_table
from jointkv.bench.arms import PoolSize, make_arms
from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Arm, Load, ServingResult
from jointkv.cli.main import app
from jointkv.evaluate.traffic import traffic_names
from tests.report import serving_samples as samples

PROMPTS = [ServingRequest((1,) * tokens, 32) for tokens in (800, 700, 860, 840)]
Given = dict[str, Any]


def understood(options: Sequence[str]) -> Given:
    """What `jointkv bench serve` takes `options` for."""
    found: Any = typer.main.get_command(app)
    for name in ("bench", "serve"):
        found = found.commands[name]
    with found.make_context("serve", list(options)) as context:
        assert not context.args
        return dict(context.params)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    """What was asked for; every answer is a result of the arms, one request in four seconds."""
    found: list[Given] = []

    def served(options: Sequence[str], folder: Path) -> ServingResult | None:
        found.append({**understood(options), "output": folder})
        if "names" in options and "--rate" in options:
            return None
        arms = [Arm(name=each.split("=")[0], title=each, pool_blocks=100) for each in found[-1]["arm"]]
        result = samples.result(loads=[Load(kind="closed", concurrency=4)], arms=arms, rounds=1)
        return samples.with_runs(result, requests_per_s=0.2504)

    monkeypatch.setattr(serving_table, "served", served)
    monkeypatch.setattr(serving_table, "_tokenizer", lambda model: None)
    work = type("Work", (), {"requests": PROMPTS})
    monkeypatch.setattr(serving_table, "from_traffic", lambda name, tokenizer, count, *rest: work)
    return found


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["serving_table.py", *words, "--output", str(tmp_path)])
        serving_table.main()

    return run


def test_stock_says_how_fast_requests_may_come(asked: list[Given], table: Callable[..., None], tmp_path: Path) -> None:
    table("--traffic", "near_prefix", "--requests", "4", "--repeats", "2")
    first, second = asked
    assert first["arm"] == ["stock"] and first["rate"] is None and first["repeats"] == 1
    assert second["rate"] == "0.25" and second["repeats"] == 2
    differ = {name for name in first if first[name] != second[name]}
    assert differ == {"arm", "rate", "repeats", "output"}, "the same requests, pool and closed loop"
    assert first["concurrency"] == "4" and first["pool_blocks"] == serving_table.pool_blocks(PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["near_prefix.json"]
    assert ServingResult.load(tmp_path / "near_prefix.json").arms[0].name == "stock"


def test_moved_text_is_looked_for_where_it_moves(asked: list[Given], table: Callable[..., None]) -> None:
    table("--traffic", "near_prefix", "--traffic", "retrieval")
    pool = PoolSize(100, 32, 30 * 3 * 64 * 2, 30, "float32")
    still, moved = [make_arms(given["arm"], pool, {}) for given in (asked[1], asked[3])]
    assert [arm.name for arm in still] == ["stock", "fused", "probed", "large_pool"]
    assert [arm.name for arm in moved] == ["stock", "fused", "moved", "large_pool"]
    options = [arms[2].fusion for arms in (still, moved)]
    assert options == [{"reuse": "probed"}, {"reuse": "probed", "moved": True}]


def test_every_traffic_is_in_the_table_or_left_out(asked: list[Given], table: Callable[..., None]) -> None:
    with pytest.raises(SystemExit, match="not finished: names; the same command goes on"):
        table()
    assert {given["traffic"] for given in asked} | serving_table.LEFT_OUT == set(traffic_names())
    assert serving_table.MOVING | serving_table.FEWER.keys() <= set(traffic_names()) - serving_table.LEFT_OUT
    assert {given["requests"] for given in asked if given["traffic"] == "long_documents"} == {6}


def test_the_pool_is_short_and_holds_the_longest_request() -> None:
    assert serving_table.pool_blocks(PROMPTS) == 29
    assert serving_table.pool_blocks(PROMPTS * 4) == 106
    assert serving_table.pool_blocks(PROMPTS[:1]) == 27


@pytest.mark.parametrize(("code", "leaves"), [(0, None), (1, None), (130, 130), (-15, 130)])
def test_a_failure_is_said_and_an_interrupt_ends_it(
    code: int, leaves: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program beside the interpreter is asked for; here one that only ends."""
    program = tmp_path / "jointkv"
    program.write_text(f"#!/bin/sh\n{f'exit {code}' if code >= 0 else f'kill {code} $$'}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "serving.json").write_text(samples.result(rounds=1).model_dump_json())
    if leaves is not None:
        with pytest.raises(SystemExit) as left:
            serving_table.served([], tmp_path)
        assert left.value.code == leaves
    else:
        assert (serving_table.served([], tmp_path) is None) == bool(code)
