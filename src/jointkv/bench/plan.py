"""What a serving benchmark runs, and in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Arm, Key, Load


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        block_bytes: bytes of a block of the pool, by arm.
        warmup: requests of the same traffic that are served before every run.
        model: the name it is served under.
        location: its folder or hub name.
        seed: of the arrivals in the first round; every later round takes the next one, the same in all arms.
        facts: the fields of `ServingResult` that are known beforehand.
    """

    arms: tuple[Arm, ...]
    loads: tuple[Load, ...]
    rounds: int
    requests: tuple[ServingRequest, ...]
    block_bytes: Mapping[str, int]
    model: str
    location: str
    seed: int
    facts: Mapping[str, Any]
    warmup: tuple[ServingRequest, ...] = ()

    def schedule(self) -> list[tuple[int, Arm]]:
        """Rounds, from 1, and arms: one server each, in the order of execution.

        Arms are rotated from round to round, so that none always follows the same one or comes first.
        """
        turns = [(number, number % len(self.arms)) for number in range(self.rounds)]
        return [(number + 1, arm) for number, turn in turns for arm in (*self.arms[turn:], *self.arms[:turn])]

    def position(self, number: int, arm: Arm, load: Load) -> int:
        """Place of a run in the order of execution, from 0; more rounds do not change it."""
        return self.schedule().index((number, arm)) * len(self.loads) + self.loads.index(load)

    def left(self, done: Container[Key]) -> list[tuple[int, Arm, list[Load]]]:
        """Rounds and arms with the loads of each that are not `done`, in the order of execution."""
        found = [
            (number, arm, [load for load in self.loads if (arm.name, load.label, number) not in done])
            for number, arm in self.schedule()
        ]
        return [each for each in found if each[2]]

    def pool_bytes(self) -> int:
        """Bytes of the largest pool of all arms."""
        return max(arm.pool_blocks * self.block_bytes[arm.name] for arm in self.arms)

    def settings(self) -> dict[str, Any]:
        """What runs must have in common to be compared, as JSON: all but the number of rounds."""
        return {
            **{name: value for name, value in self.facts.items() if name not in ("command", "traffic_description")},
            "arms": [arm.model_dump() for arm in self.arms],
            "profiles": {arm.name: _profile_digest(arm) for arm in self.arms},
            "loads": [load.label for load in self.loads],
            "requests_sha256": self._requests_digest(),
        }

    def _requests_digest(self) -> str:
        digest = hashlib.sha256()
        for request in (*self.warmup, *self.requests):
            digest.update(repr((request.prompt, request.output_tokens, request.timestamp)).encode())
            if request.session is not None or request.salt is not None:
                digest.update(repr((request.session, request.think, request.salt)).encode())
        return digest.hexdigest()


def _profile_digest(arm: Arm) -> str | None:
    """Another profile may come to stand under the same name."""
    if arm.fusion is None or arm.fusion.get("profile") is None:
        return None
    return hashlib.sha256(Path(arm.fusion["profile"]).read_bytes()).hexdigest()
