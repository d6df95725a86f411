"""Turns of sessions with requests that are none: who is sent when, and with which salt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from jointkv.bench.in_turn import InTurn, Turn


class World:
    """A request function whose answers come one by one, when all that may be sent has been."""

    def __init__(self, failing: frozenset[str] = frozenset()) -> None:
        self.events: list[str] = []
        self.salts: dict[str, Any] = {}
        self._failing = failing
        self._open: list[asyncio.Event] = []

    async def send(self, request: Any, session: Any, pbar: Any = None) -> str:
        name, done = request.request_id, asyncio.Event()
        self.events.append(f"{name} sent")
        self.salts[name] = request.extra_body
        self._open.append(done)
        await done.wait()
        self.events.append(f"{name} done")
        if name in self._failing:
            raise OSError("refused")
        return str(name)

    async def run(self, turns: Sequence[Turn], concurrency: int | None = None) -> list[Any]:
        gate = InTurn(self.send, turns, concurrency)
        requests = [SimpleNamespace(request_id=str(at), extra_body={"temperature": 0.0}) for at in range(len(turns))]
        tasks = [asyncio.create_task(gate.send(request, None)) for request in requests]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if self._open:
                self._open.pop(0).set()
        return await asyncio.gather(*tasks, return_exceptions=True)


def test_a_turn_follows_the_answer_before_it() -> None:
    world = World()
    assert asyncio.run(world.run([(1, 0.0, None), (2, 0.0, None), (1, 0.0, None), (None, 0.0, None)])) == [
        *("0", "1", "2", "3")
    ]
    assert world.events[:3] == ["0 sent", "1 sent", "3 sent"]
    assert world.events.index("0 done") < world.events.index("2 sent")


def test_waiting_turns_take_no_place() -> None:
    """Of the first session two more turns wait; the second session is sent all the same."""
    world = World()
    asyncio.run(
        world.run([(1, 0.0, None), (1, 0.0, None), (1, 0.0, None), (2, 0.0, None), (3, 0.0, None)], concurrency=2)
    )
    assert world.events[:2] == ["0 sent", "3 sent"]
    under_way = [
        sum(1 if event.endswith("sent") else -1 for event in world.events[: at + 1]) for at in range(len(world.events))
    ]
    assert max(under_way) == 2


def test_a_failed_turn_lets_the_next_one_go() -> None:
    world = World(failing=frozenset({"0"}))
    first, second = asyncio.run(world.run([(1, 0.0, None), (1, 0.001, None)]))
    assert isinstance(first, OSError) and second == "1"


def test_each_request_has_the_salt_of_its_tenant() -> None:
    world = World()
    asyncio.run(world.run([(1, 0.0, "a"), (2, 0.0, "b"), (None, 0.0, None)]))
    assert world.salts == {
        "0": {"temperature": 0.0, "cache_salt": "a"},
        "1": {"temperature": 0.0, "cache_salt": "b"},
        "2": {"temperature": 0.0},
    }
