"""Reuse before compute in a real engine: what is skipped, what clients see, and what is left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.platforms.cpu import CpuPlatform

from jointkv.policy.reuse import ReuseRule
from jointkv.vllm_plugin.scheduler import side
from tests.vllm_plugin.census import Census
from tests.vllm_plugin.engines import LOSSY, Engine, Prompt, engine, near_prefix, text, write_model

BLOCK, OUT = 32, 8
PROBED = {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}
EVENTS = 400
HEAD, TAIL = text(BLOCK, 1), text(20, 2)


@pytest.fixture(scope="module", autouse=True)
def _bold() -> Iterator[None]:
    """Among so few words as a random model has, everything echoes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side, "ReuseRule", partial(ReuseRule, near=1.0, echoes=False))
        yield


@dataclass
class Served:
    """An engine that reuses, and what was counted in it.

    Attributes:
        computed: tokens that steps were scheduled for.
    """

    engine: Engine
    computed: int = 0
    before: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        schedule = self.engine.vllm_scheduler.schedule

        def counted(*args: Any, **options: Any) -> Any:
            output = schedule(*args, **options)
            self.computed += output.total_num_scheduled_tokens
            return output

        self.engine.vllm_scheduler.schedule = counted

    def start(self) -> None:
        """Count anew, with nothing resident."""
        assert self.engine.llm.reset_prefix_cache()
        self.count_anew()

    def count_anew(self) -> None:
        self.computed, self.before = 0, self.engine.statistics

    def new(self, name: str) -> int:
        return int(self.engine.statistics[name] - self.before[name])

    def done(self) -> None:
        """Nothing is left behind."""
        self.engine.assert_drained()
        assert not self.engine.side.reuse.intakes and not self.engine.side.reuse.stray()
        assert not self.engine.pool.cached_block_hashes_by_block
        assert self.new("faults") == 0


@pytest.fixture(scope="module")
def serene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in which a different first line changes K and V of what follows next to nothing."""
    return write_model(tmp_path_factory.mktemp("serene"), context=0.005)


@pytest.fixture(scope="module")
def expected(serene: Path) -> list[Prompt]:
    """What the stock engine answers to near prefixes."""
    with engine(serene) as stock:
        return stock.generate(near_prefix(5), OUT)


@pytest.fixture(scope="module")
def reusing(serene: Path) -> Iterator[Served]:
    with engine(serene, fusion=PROBED, disable_log_stats=False) as served:
        yield Served(served)


@pytest.fixture
def served(reusing: Served) -> Iterator[Served]:
    reusing.start()
    yield reusing
    reusing.engine.finish()
    reusing.done()


def test_only_header_entry_block_and_tail_are_computed(expected: list[Prompt], served: Served) -> None:
    """The donor has finished. Answers and what clients are told of their prompts are those of the stock engine."""
    prompts = near_prefix(5)
    reads: list[tuple[int, int]] = []
    served.engine.generate(prompts[:1], OUT)
    served.count_anew()
    step = served.engine.llm.llm_engine.step

    def watched() -> Any:
        outputs = step()
        reads.extend((len(one.prompt_token_ids), one.num_cached_tokens) for one in outputs if one.finished)
        return outputs

    served.engine.llm.llm_engine.step = watched
    try:
        answers = served.engine.generate(prompts[1:], OUT)
    finally:
        served.engine.llm.llm_engine.step = step
    tokens, reused = len(prompts[0]), 20 * BLOCK  # blocks 2 to 21
    assert served.new("prompt_tokens_skipped") == 4 * reused
    assert served.computed == 4 * (tokens - reused + OUT - 1)
    assert (served.new("reuse_runs"), served.new("reuse_helpers"), served.new("reuse_gaps")) == (4, 4, 4)
    assert reads == [(tokens, reused)] * 4
    assert answers == expected[1:]


def test_each_run_has_an_entry_block_and_gaps_are_computed(served: Served) -> None:
    first, own, second = text(7 * BLOCK, 11), text(3 * BLOCK, 12), text(8 * BLOCK, 13)
    served.engine.generate([text(BLOCK, 3) + first + text(3 * BLOCK, 14) + second + TAIL])
    served.count_anew()
    served.engine.generate([HEAD + first + own + second + TAIL])
    assert served.new("prompt_tokens_skipped") == (6 + 7) * BLOCK
    assert (served.new("reuse_runs"), served.new("reuse_gaps")) == (2, 2)


def test_a_page_with_a_bad_witness_is_computed(served: Served) -> None:
    body = text(12 * BLOCK, 21)
    donor = served.engine.submit(text(BLOCK, 3) + body + TAIL, 4)
    served.engine.run_until_decoding()
    page = served.engine.table(donor)[6]
    served.engine.finish()
    residents = served.engine.side.candidates.residents
    residents.testify(np.array([page]), np.array([5.0], np.float32), np.zeros(1, np.uint64))
    served.count_anew()
    served.engine.generate([HEAD + body + TAIL])
    assert served.new("prompt_tokens_skipped") == (11 - 1) * BLOCK
    assert (served.new("reuse_runs"), served.new("reuse_gaps"), served.new("reuse_helpers")) == (1, 2, 2)


@pytest.mark.parametrize(
    "options", [{"extra": {"jointkv": False}}, {"prompt_logprobs": 1}, {"salt": "another"}], ids=str
)
def test_who_does_not_take_part_computes_everything(options: dict[str, Any], served: Served) -> None:
    prompts = near_prefix(2)
    served.engine.generate(prompts[:1], 2)
    served.count_anew()
    served.engine.generate(prompts[1:], 2, **options)
    assert served.new("prompt_tokens_skipped") == served.new("reuse_helpers") == 0
    assert served.computed == len(prompts[1]) + 1


@pytest.mark.parametrize("steps", range(5))
def test_a_helper_goes_with_its_request(steps: int, served: Served) -> None:
    """Aborted while its helper waits, runs or is compared, when pages are adopted, and while it runs."""
    prompts = near_prefix(3)
    served.engine.generate(prompts[:1], 2)
    name = served.engine.submit(prompts[1], 20)
    for _ in range(steps):
        served.engine.step()
    served.engine.abort(name)
    assert not served.engine.vllm_scheduler.requests
    assert served.engine.pages_in_use == 0


def test_statistics_of_requests_do_not_count_helpers(served: Served) -> None:
    prompts, seen = near_prefix(4), []
    served.engine.generate(prompts[:1], 2)
    update = served.engine.vllm_scheduler.update_from_output

    def watched(*args: Any) -> Any:
        outputs = update(*args)
        seen.extend((client.scheduler_stats, list(client.outputs)) for client in outputs.values())
        return outputs

    served.engine.vllm_scheduler.update_from_output = watched
    try:
        served.engine.generate(prompts[1:], 4)
    finally:
        served.engine.vllm_scheduler.update_from_output = update
    for stats, outputs in seen:
        counts = stats.num_running_reqs, stats.num_waiting_reqs, stats.num_skipped_waiting_reqs
        assert sum(counts) <= 3 and min(counts) >= 0
        assert not any("-gap-" in output.request_id for output in outputs)
    cache = [stats.prefix_cache_stats for stats, _ in seen]
    assert sum(one.requests for one in cache) == 3
    assert sum(one.queries for one in cache) == 3 * len(prompts[0])
    assert sum(one.hits for one in cache) == 3 * 20 * BLOCK


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
                self.served.llm.reset_prefix_cache(reset_running_requests=self.rng.random() < 0.5)
            else:
                self.served.step()
            self.alive = [name for name in self.alive if name not in self.served.outputs]
        self.served.finish()

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
        ({"reuse_audit_rate": 0.2}, {}),
        ({"reuse": "licensed", "reuse_miss_rate": 0.5, "reuse_confidence": 0.5}, {"scheduling_policy": "priority"}),
        ({}, {"async_scheduling": True, "max_num_seqs": 3}),
    ],
    ids=["chunks", "licensed, priorities", "asynchronous, few seats"],
)
def test_random_requests(
    fusion: dict[str, Any],
    options: dict[str, Any],
    calm: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    if options.get("async_scheduling"):
        _keep_asynchronous(monkeypatch)
    settings: dict[str, Any] = {"max_num_batched_tokens": 128, "max_num_seqs": 12, **options}
    with engine(calm, 40, {**PROBED, **fusion}, **settings) as served:
        assert served.core.vllm_config.scheduler_config.async_scheduling == options.get("async_scheduling", False)
        if not options.get("async_scheduling"):
            served.watchers.append(Census(served, monkeypatch).after_step)
        served.side.reuse._draw = random.Random(7).random  # whom an audit is drawn for changes all that follows
        traffic = Traffic(served, 7, options.get("scheduling_policy") == "priority")
        traffic.run(EVENTS)
        served.assert_drained()
        found = served.statistics
        assert found["faults"] == 0 and found["prompt_tokens_skipped"] > 0 and found["reuse_helpers"] > 0, found
        for name, tokens in served.outputs.items():
            assert len(tokens) == traffic.asked[name]
        assert not served.side.reuse.intakes and not served.side.reuse.stray()
        keys = {key[:-4] for key in served.pool.cached_block_hash_to_block._cache}
        assert not keys & traffic.private and not served.pool.cached_block_hashes_by_block
        assert served.preempted > 0
        for name in ("prompt_tokens_skipped", "reuse_helpers", "reuse_audits"):
            record_property(name, found[name])


def _keep_asynchronous(patch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU platform takes asynchronous scheduling back; nothing but that keeps it from it."""
    check = CpuPlatform.check_and_update_config

    def checked(config: Any) -> None:
        wanted = config.scheduler_config.async_scheduling
        check(config)
        config.scheduler_config.async_scheduling = wanted

    patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(checked))
