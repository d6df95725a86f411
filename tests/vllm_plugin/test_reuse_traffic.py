"""Reuse before compute under random requests, aborts, preemptions and resets, in real engines."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.request import RequestStatus

from tests.hazards import FIRST, FIRST_AHEAD, runs
from tests.vllm_plugin.census import Census
from tests.vllm_plugin.engines import LOSSY, Engine, engine, text

BLOCK = 32
PROBED = {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}
IN_PLACE = {"moved": True, "attention": "shared"}
EVENTS = 400

pytestmark = pytest.mark.usefixtures("bold")


class Traffic:
    """Random requests, aborts and resets. `private` are all hashes that only one request ever had."""

    def __init__(self, served: Engine, seed: int, priorities: bool) -> None:
        self.served, self.rng, self.priorities = served, random.Random(seed), priorities
        self.alive: list[str] = []
        self.asked: dict[str, int] = {}
        self.private: set[bytes] = set()
        make_private = served.side.tables.make_private

        def watched(request: Any, start: int, *more: Any) -> None:
            make_private(request, start, *more)
            self.private.update(request.block_hashes[start // BLOCK :])

        served.side.tables.make_private = watched

    def run(self, events: int) -> None:
        for _ in range(events):
            dice = self.rng.random()
            if dice < 0.35:
                self.ask()
            elif dice < 0.43 and self.alive:
                self.served.abort(self.alive.pop(self.rng.randrange(len(self.alive))))
            elif dice < 0.45:
                self.reset(self.rng.random() < 0.5)
            else:
                self.served.step()
            self.alive = [name for name in self.alive if name not in self.served.outputs]
        self.served.finish()

    def reset(self, running: bool) -> None:
        """Empty the prefix cache, and preempt who runs for that if `running`.

        With a store vLLM cannot do that while pages are loaded, nor where steps overlap.
        """
        scheduler = self.served.vllm_scheduler
        gone = any(RequestStatus.is_finished(one.status) for one in scheduler.requests.values())
        loading = gone or bool(scheduler.kv_holding_waiting) or scheduler.defer_block_free
        self.served.llm.reset_prefix_cache(reset_running_requests=running and not loading)

    def ask(self) -> None:
        rng = self.rng
        head, shared = text(rng.choice([16, 40]), rng.randrange(50)), text(300, rng.randrange(2))
        prompt = head + shared[: rng.randrange(120, 300)] + text(rng.randrange(1, 40), rng.randrange(10**6))
        out = rng.randrange(1, 12)
        options: dict[str, Any] = {"salt": rng.choice([None, None, None, "red"])}
        options.update(rng.choice([{}] * 8 + [{"extra": {"jointkv": False}}, {"prompt_logprobs": 1}, {"logprobs": 0}]))
        if self.priorities:
            options["priority"] = rng.randrange(3)
        name = self.served.submit(prompt, out, **options)
        self.alive.append(name)
        self.asked[name] = out


@pytest.mark.hazard(
    "Reuse",
    "some order of requests, aborts, preemptions and resets leaves a helper, a page or a private hash behind",
    "never: requests end with all their tokens, helpers with their request, private hashes with both",
)
@pytest.mark.parametrize(
    ("fusion", "options"),
    [
        pytest.param({"reuse_audit_rate": 0.2}, {}, marks=runs("reuse", FIRST)),
        pytest.param(
            {"reuse": "licensed", "reuse_miss_rate": 0.5, "reuse_confidence": 0.5},
            {"scheduling_policy": "priority"},
            marks=runs("reuse", FIRST),
        ),
        pytest.param({}, {"async_scheduling": True, "max_num_seqs": 3}, marks=runs("reuse", FIRST_AHEAD)),
        pytest.param(
            {"reuse_audit_rate": 0.2, "moved": True},
            {"async_scheduling": True},
            marks=[*runs("text that moved", FIRST_AHEAD), pytest.mark.slow],
        ),
        pytest.param({"moved": True}, {}, marks=[*runs("text that moved", FIRST), pytest.mark.slow]),
        pytest.param({**IN_PLACE, "reuse_audit_rate": 0.1}, {}, marks=runs("text read in place", FIRST)),
        pytest.param(
            IN_PLACE, {"async_scheduling": True}, marks=[*runs("text read in place", FIRST_AHEAD), pytest.mark.slow]
        ),
    ],
    ids=[
        "chunks",
        "licensed, priorities",
        "asynchronous, few seats",
        "moved, asynchronous",
        "moved",
        "in place",
        "in place, asynchronous",
    ],
)
def test_random_requests(
    fusion: dict[str, Any],
    options: dict[str, Any],
    calm: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    settings: dict[str, Any] = {"max_num_batched_tokens": 128, "max_num_seqs": 12, **options}
    with engine(calm, 40, {**PROBED, **fusion}, **settings) as served:
        assert served.core.vllm_config.scheduler_config.async_scheduling == options.get("async_scheduling", False)
        if not options.get("async_scheduling"):
            served.watchers.append(Census(served, monkeypatch).after_step)
        served.side.reuse.look_up.draw = random.Random(7).random  # whom an audit is drawn for changes all that follows
        traffic = Traffic(served, 7, options.get("scheduling_policy") == "priority")
        traffic.run(EVENTS)
        while not served.statistics["prompt_tokens_skipped"] and served.steps < 20 * EVENTS:
            traffic.run(EVENTS // 4)  # the order in which pages are freed, and so what is resident, is not seeded
        served.assert_drained()
        found = served.statistics
        assert found["faults"] == 0 and found["prompt_tokens_skipped"] > 0 and found["reuse_helpers"] > 0, found
        for name, tokens in served.outputs.items():
            assert len(tokens) == traffic.asked[name]
        assert not served.side.reuse.intakes and not served.side.reuse.stray()
        keys = {key[:-4] for key in served.pool.cached_block_hash_to_block._cache}
        assert not keys & traffic.private and not served.pool.cached_block_hashes_by_block
        assert served.preempted > 0
        if fusion.items() >= IN_PLACE.items():
            (reading,) = get_kv_transfer_group().worker.readings.values()
            assert found["blocks_in_place"] > 0 and found["pages_filled"] == 0 and reading.fault is None
        for name in ("prompt_tokens_skipped", "reuse_helpers", "reuse_audits"):
            record_property(name, found[name])
