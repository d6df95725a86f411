"""What is served before a measurement, and how much of it for whom."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jointkv.bench import server as serving
from jointkv.bench import warm
from jointkv.bench.plan import Plan
from jointkv.bench.requests import ServingRequest, Workload
from jointkv.bench.server import Server, ServerFailed, free_port
from jointkv.bench.warm import fill, warm_traffic, warm_up
from jointkv.errors import BadInput
from tests.bench.plans import arm, plan
from tests.bench.test_server import STUB

REQUESTS = (ServingRequest((1, 2, 3, 4), 3), ServingRequest((5, 6), 3))
BEFORE = tuple(ServingRequest((number,) * 16, 3) for number in range(6))
REUSE = arm("reuse", 3, fusion={"reuse": "licensed"})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(serving, "GRACE_SECONDS", 0.5)
    with Server([sys.executable, str(STUB), "reuse"], os.environ, free_port(), tmp_path / "log") as started:
        started.start(30.0)
        yield started


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be sent."""
    bodies: list[Any] = []
    monkeypatch.setattr(warm, "get", lambda url, timeout, body: bodies.append(body))
    return bodies


def made() -> Plan:
    return replace(plan(), requests=REQUESTS, warmup=BEFORE)


def test_warm_up_sends_and_forgets(server: Server, sent: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "reset_prefix_cache", lambda: sent.append("reset"))
    warm_up(server, "m", REQUESTS)
    assert sent[-1] == "reset" and len(sent) == 1 + warm.WARM_UP_REQUESTS
    assert all(body["model"] == "m" and 0 < len(body["prompt"]) <= 4 for body in sent[:-1])
    monkeypatch.undo()
    server.url += "/elsewhere"
    with pytest.raises(ServerFailed, match="did not answer the warm-up"):
        warm_up(server, "m", REQUESTS)


@pytest.mark.parametrize(
    ("name", "blocks", "served"), [("reuse", 3, 6), ("stock", 3, 3), ("stock", 1, 1), ("stock", 99, 6)]
)
def test_what_reuses_gets_all_and_another_what_its_pool_can_hold(
    server: Server, sent: list[Any], name: str, blocks: int, served: int
) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM")
    chosen = REUSE if name == "reuse" else arm(name, blocks)
    found = warm_traffic(made(), server, chosen)
    assert found is not None and found.requests == served and found.seconds > 0
    assert [body["prompt"] for body in sorted(sent, key=lambda body: body["prompt"])] == [
        list(each.prompt) for each in BEFORE[-served:]
    ]


def test_it_is_counted_for_itself(server: Server) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM")
    assert warm_traffic(plan(), server, REUSE) is None
    found = warm_traffic(made(), server, REUSE)
    assert found is not None and found.reuse is not None
    assert found.reuse.audits == 6 and found.reuse.skipped_tokens == 6


def test_the_first_requests_are_for_before() -> None:
    timed = tuple(replace(each, timestamp=float(number)) for number, each in enumerate(BEFORE))
    split = Workload("log", "", timed).split(4)
    assert [each.timestamp for each in split.requests] == [0.0, 1.0] and split.warmup == timed[:4]
    assert Workload("log", "", BEFORE).split(0).requests == BEFORE
    with pytest.raises(BadInput, match="--warmup 6: of 6 requests none would be left"):
        Workload("log", "", BEFORE).split(6)


def test_warm_requests_have_the_salt_of_their_tenant(server: Server, sent: list[Any]) -> None:
    salted = (replace(BEFORE[0], salt="a"), BEFORE[1])
    warm_traffic(replace(made(), warmup=salted), server, REUSE)
    assert sorted((body["prompt"][0], body.get("cache_salt")) for body in sent) == [(0, "a"), (1, None)]


def test_an_empty_store_is_filled_with_the_requests(
    server: Server, sent: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "SETTLED_SECONDS", 0.0)
    fill(server, made(), tmp_path)
    assert [body["prompt"] for body in sent] == [list(request.prompt) for request in REQUESTS]
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / "one.data").write_bytes(b"pages")
    fill(server, made(), tmp_path)
    assert len(sent) == len(REQUESTS), "it has pages"
