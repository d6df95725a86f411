"""One engine core whose requests meet random events, and a worker that has no model. Everything is checked always."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import core as engine_core
from vllm.v1.request import Request

from jointkv.vllm_plugin import engine_args
from jointkv.vllm_plugin.engine.others import connectors
from tests.vllm_plugin.scheduler.fake_files import FILES, Files
from tests.vllm_plugin.scheduler.fake_pages import ALIKE, Model
from tests.vllm_plugin.scheduler.fake_second_runner import SecondRunner
from tests.vllm_plugin.scheduler.fake_worker import Mail, Runner, executor_of
from tests.vllm_plugin.scheduler.oracle import ABORTED, Oracle
from tests.vllm_plugin.scheduler.reuse_oracle import ReuseOracle

BLOCK = 4
PAGES = 30
"""For every layer group, unless a variant says otherwise; a request of `LONGEST` tokens needs 16."""

LONGEST = 64
MOST = 12
"""Requests at a time."""

CHUNK = 16
TEXTS = [[100 * (number + 1) + place % CHUNK for place in range(40)] for number in range(2)]
"""They repeat themselves, so that chunks of one request are alike."""

SALTS = (None, None, "red", "blue")
IN_CHUNKS = {"chunk_tokens": CHUNK}

WRITTEN = {"directions": "written", "own_norms": True, "max_relative_error": 0.24, "max_token_error": 0.35, **ALIKE}
ROOM = {"pages": 60, "tokens": 48}
"""For blocks to become full together, and for pages that are held beside those of running requests."""

IN_PLACE = {"moved": True, "attention": "shared"}
EARNED_SOON = {"reuse": "licensed", "reuse_miss_rate": 0.9, "reuse_confidence": 0.3, "reuse_audit_rate": 0.2}

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one table": ({}, {}),
    "two groups": ({"layer_groups": 2}, {}),
    "chunks": ({"scope": "chunk", **IN_CHUNKS}, {}),
    "two groups, chunks, strict": ({"layer_groups": 2, "scope": "both", "isolation": "strict", **IN_CHUNKS}, {}),
    "asynchronous": ({"scope": "both", **IN_CHUNKS}, {"async_scheduling": True}),
    "asynchronous, two groups": ({"layer_groups": 2, "max_candidates": 1}, {"async_scheduling": True, "apart": True}),
    "three stages": ({"scope": "both", **IN_CHUNKS}, {"pipeline_parallel_size": 3}),
    "second runner": ({"scope": "both", **IN_CHUNKS}, {"second_runner": True}),
    "second runner, asynchronous, two groups": (
        {"layer_groups": 2},
        {"second_runner": True, "async_scheduling": True, "apart": True},
    ),
    "beside files": ({"scope": "both", **IN_CHUNKS}, {"beside": [FILES]}),
    "beside files, second runner, asynchronous, two groups": (
        {"layer_groups": 2},
        {"beside": [FILES], "second_runner": True, "async_scheduling": True, "apart": True},
    ),
    "signatures": ({"candidates": "signature"}, {}),
    "signatures, asynchronous, two groups, chunks": (
        {"candidates": "both", "layer_groups": 2, "scope": "both", "max_candidates": 1, **IN_CHUNKS},
        {"async_scheduling": True, "apart": True},
    ),
    "directions": ({**WRITTEN, "candidates": "signature"}, ROOM),
    "directions, both, chunks, stages": (
        {**WRITTEN, "candidates": "both", "scope": "chunk", **IN_CHUNKS},
        {"pipeline_parallel_size": 3, **ROOM},
    ),
    "directions, asynchronous, two groups": (
        {**WRITTEN, "candidates": "signature", "layer_groups": 2},
        {"async_scheduling": True, "apart": True, **ROOM},
    ),
    "directions, both, asynchronous, full pool": (
        {**WRITTEN, "candidates": "both", "min_pool_usage": 0.5, "max_blocks_per_step": 6},
        {"async_scheduling": True, "scheduling_policy": "priority", **ROOM, "pages": 45},
    ),
    "directions, second runner": (
        {**WRITTEN, "candidates": "signature"},
        {"beside": [FILES], "second_runner": True, **ROOM},
    ),
    "directions, both, second runner, two groups": (
        {**WRITTEN, "candidates": "both", "layer_groups": 2},
        {"second_runner": True, "apart": True, **ROOM},
    ),
    "directions, second runner, asynchronous": (
        {**WRITTEN, "candidates": "signature"},
        {"second_runner": True, "async_scheduling": True, **ROOM},
    ),
    "directions, both, second runner, asynchronous, two groups": (
        {**WRITTEN, "candidates": "both", "layer_groups": 2},
        {"second_runner": True, "async_scheduling": True, "apart": True, **ROOM},
    ),
    "priorities, full pool": (
        {"min_pool_usage": 0.5, "max_blocks_per_step": 3},
        {"scheduling_policy": "priority"},
    ),
    "reuse": ({"reuse": "probed", "reuse_audit_rate": 0.2}, {}),
    "reuse, compared apart": ({"reuse": "probed", "reuse_audit_rate": 0.2}, {"apart": True}),
    "reuse, asynchronous": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, "scope": "both", **IN_CHUNKS},
        {"async_scheduling": True},
    ),
    "reuse, two stages": ({"reuse": "probed", "reuse_audit_rate": 0.1}, {"pipeline_parallel_size": 2}),
    "reuse, second runner": ({"reuse": "probed", "reuse_audit_rate": 0.1}, {"second_runner": True}),
    "reuse, second runner, asynchronous": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, "scope": "both", **IN_CHUNKS},
        {"second_runner": True, "async_scheduling": True, "apart": True},
    ),
    "reuse, moved text": ({"reuse": "probed", "reuse_audit_rate": 0.1, "moved": True}, {}),
    "reuse, moved text, asynchronous": (
        {**EARNED_SOON, "moved": True},
        {"second_runner": True, "async_scheduling": True, "apart": True},
    ),
    "reuse, in place": ({"reuse": "probed", "reuse_audit_rate": 0.1, **IN_PLACE}, {}),
    "reuse, in place, priorities": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, **IN_PLACE},
        {"scheduling_policy": "priority"},
    ),
    "reuse, in place, two stages": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, **IN_PLACE},
        {"pipeline_parallel_size": 2},
    ),
    "reuse, in place, second runner": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, **IN_PLACE},
        {"second_runner": True},
    ),
    "reuse, in place, asynchronous": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, **IN_PLACE},
        {"async_scheduling": True},
    ),
    "reuse, in place, second runner, asynchronous": (
        {**EARNED_SOON, **IN_PLACE},
        {"second_runner": True, "async_scheduling": True, "apart": True},
    ),
    "reuse, signatures": ({"reuse": "probed", "reuse_audit_rate": 0.2, "candidates": "both"}, {}),
    "reuse, priorities, licence": (
        {**EARNED_SOON, "min_pool_usage": 0.5},
        {"scheduling_policy": "priority"},
    ),
}
"""Options of the plugin, and of the engine and its worker."""


def combination(variant: str) -> tuple[bool, bool, bool]:
    """Whether it has the second runner, is a step ahead, and reuses."""
    fusion, options = VARIANTS[variant]
    return options.get("second_runner", False), options.get("async_scheduling", False), "reuse" in fusion


SHARES = Counter(map(combination, VARIANTS))
"""How many variants a combination has."""

FAULTS = {"lost": "is lost", "late": "is lost", "fault": "on purpose"}
"""Accidents of a verdict that switch fusion off, and what is said then."""


def configuration(model: Path, fusion: dict[str, Any], options: dict[str, Any]) -> Any:
    """What the engine makes of its arguments."""
    attached = engine_args(
        options.get("beside", ()), **{"min_pool_usage": 0.0, "retry_after": 0.0, "max_faults": 16, **fusion}
    )
    config = EngineArgs(
        str(model),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        block_size=BLOCK,
        num_gpu_blocks_override=1 + options.get("pages", PAGES) * fusion.get("layer_groups", 1),
        max_model_len=LONGEST,
        max_num_seqs=8,
        max_num_batched_tokens=options.get("tokens", 24),
        scheduling_policy=options.get("scheduling_policy", "fcfs"),
        pipeline_parallel_size=options.get("pipeline_parallel_size", 1),
        kv_transfer_config=KVTransferConfig(**attached["kv_transfer_config"]),
        worker_cls=attached["worker_cls"],
        scheduler_cls=attached.get("scheduler_cls"),
    ).create_engine_config()
    # vLLM takes it back on the CPU.
    config.scheduler_config.async_scheduling = options.get("async_scheduling", False)
    return config


class SchedulerMachine:
    """One engine core and its requests. Everything is checked after every step and every event.

    Args:
        config: of the engine.
        totals: what happens is added to it.

    Attributes:
        history: names of events so far.
    """

    def __init__(self, config: Any, totals: Counter[str]) -> None:
        self.config, self.totals = config, totals
        self.history: list[str] = []
        self.mail = Mail(config.parallel_config.world_size)
        reuses = any("reuse" in each.options for each in connectors(config.kv_transfer_config))
        self.oracle = (ReuseOracle if reuses else Oracle)(Model(), totals)
        Files.model, Files.stored, Files.totals = self.oracle.model, set(), totals
        runners: list[Runner] = []

        def make_runner(*configs: Any) -> Runner:
            runner = SecondRunner if config.use_v2_model_runner else Runner
            runners.append(runner(*configs, self.oracle.model, self.mail, self.oracle))
            return runners[0]

        self.core = engine_core.EngineCore(config, executor_of(make_runner), log_stats=False)
        self.oracle.attach(self.core, runners[0])
        assert self.core.scheduler.use_v2_model_runner == isinstance(runners[0], SecondRunner)
        self.oracle.side.reuse.look_up.draw = random.Random(0).random
        self.moves = self.oracle.settings.moves
        self.names = itertools.count()

    @property
    def requests(self) -> list[Request]:
        """Of clients."""
        return [one for name, one in self.core.scheduler.requests.items() if name not in self.oracle.side.helpers]

    def event(self, rng: random.Random) -> None:
        """Let one of those happen that can, as `rng` draws."""
        events = []
        if len(self.requests) < MOST:
            events += 3 * [self.admit] + [self.next_turn]
        if self.requests:
            events += [*3 * [self.steps], self.abort, self.reset, self.evict, self.mishap]
        if self.core.scheduler.running:
            events.append(self.preempt_one)
        if self.oracle.side.tables.held:  # which is seldom
            events += [self.reset, self.preempt_one, self.abort] if self.core.scheduler.running else [self.reset]
        event = rng.choice(events)
        self.history.append(event.__name__)
        event(rng)

    def submit(
        self,
        prompt: list[int],
        out: int,
        salt: str | None = None,
        alone: bool = False,
        priority: int = 0,
        arrival: float | None = None,
    ) -> None:
        """A request; each arrives after the one before unless `arrival` says when."""
        number = next(self.names)
        params = SamplingParams(
            max_tokens=min(out, LONGEST - len(prompt)),
            temperature=0,
            ignore_eos=True,
            extra_args={"jointkv": False} if alone else None,
        )
        request = Request(
            f"request-{number}",
            prompt,
            params,
            None,
            arrival_time=float(number) if arrival is None else arrival,
            cache_salt=salt,
            priority=priority,
            block_hasher=self.core.request_block_hasher,
        )
        self.oracle.admit(request)
        self.core.add_request(request)
        self.oracle.check()

    def advance(self) -> None:
        """One step of the engine core."""
        outputs, _ = self.core.step_fn()
        for batch in (outputs or {}).values():
            for output in batch.outputs:
                self.oracle.deliver(output)
            if batch.scheduler_stats is not None:
                self.oracle.check_statistics(batch.scheduler_stats)
        for name, account in self.oracle.accounts.items():
            if account.ended is None and name not in self.core.scheduler.requests:
                assert self.oracle.may_disappear(name), "a request disappeared"
                account.ended = ABORTED
        self.oracle.check()

    def preempt(self, request: Request) -> None:
        """As a reset does with every running request."""
        scheduler = self.core.scheduler
        scheduler.running.remove(request)
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        scheduler._preempt_request(request, 0.0, drop_stale_output=True)
        self.oracle.check()

    def finish(self) -> None:
        """Every request is finished, then nothing is left."""
        for _ in range(4000):
            if not self.core.scheduler.has_requests() and not self.core.batch_queue:
                break
            self.advance()
        self.oracle.check_drained()

    def close(self) -> None:
        """Another machine of this process can start."""
        ensure_kv_transfer_shutdown()

    # Events.

    def admit(self, rng: random.Random) -> None:
        """Requests with the same text behind other heads are near; behind the same head they hit the prefix cache."""
        text, head, length = rng.choice(TEXTS), rng.randrange(700, 706), rng.randint(1, 40)
        tail, out, salt = _tail(rng), rng.randint(1, 20), rng.choice(SALTS)
        alone, priority = rng.random() < 0.1, rng.randrange(3)
        for number in range(rng.randint(1, 3)):
            size = BLOCK + (rng.randrange(4) if self.moves else 0)
            self.submit([head + number] * size + text[:length] + tail, out, salt, alone, priority)
        self.advance()

    def next_turn(self, rng: random.Random) -> None:
        """An earlier request again, with its answer so far and a new tail, under the same salt."""
        clients = self.oracle.clients
        if not clients:
            return
        earlier = rng.choice(clients).request
        prompt = [*earlier.all_token_ids, *_tail(rng)]
        if len(prompt) < LONGEST:
            self.submit(prompt, rng.randint(1, 20), earlier.cache_salt, rng.random() < 0.1, 1)

    def steps(self, rng: random.Random) -> None:
        for _ in range(rng.randint(1, 8)):
            self.advance()

    def abort(self, rng: random.Random) -> None:
        """Between two steps, or while the worker computes one."""
        request = rng.choice(self.requests)
        self.oracle.aborting.add(request.request_id)
        self.totals["aborted"] += 1
        if rng.random() < 0.5:
            self.core.aborts_queue.put_nowait([request.request_id])
            self.advance()
        else:
            self.core.abort_requests([request.request_id])
            self.oracle.accounts[request.request_id].ended = ABORTED
            self.oracle.check()

    def preempt_one(self, rng: random.Random) -> None:
        self.preempt(rng.choice(self.core.scheduler.running))

    def reset(self, rng: random.Random) -> None:
        """Empty the prefix cache for new weights, which works only while nobody runs; the connector may be told."""
        # vLLM ends with an error where it still keeps pages of those that it has just preempted.
        running = rng.random() < (0.5 if self.oracle.side.tables.held else 0.25)
        running = running and not self.core.scheduler.defer_block_free
        if self.core.reset_prefix_cache(running, rng.random() < 0.5):
            self.totals["resets"] += 1
            self.oracle.new_weights()
        self.oracle.check()

    def evict(self, rng: random.Random) -> None:
        """Pages answer for no hash any more, in use or not."""
        pages = {rng.randint(1, PAGES) for _ in range(rng.randrange(7))}
        if self.config.scheduler_config.policy == "priority":
            # Without fusion as well, vLLM preempts what it has scheduled in the same step, and the hash of a block that
            # was never computed stays. Only the order in which it reuses pages hides that, unless they lose hashes.
            pages = {page for page in pages if not self.oracle.pool.blocks[page].ref_cnt}
        self.core.scheduler.kv_cache_manager.evict_blocks(pages)
        self.oracle.check()

    def mishap(self, rng: random.Random) -> None:
        """To the next verdict."""
        accident = rng.choice(["twice"] * 6 + list(FAULTS))
        self.mail.accident = accident
        self.totals["accidents"] += 1
        self.oracle.expected_faults.add(FAULTS.get(accident, "nothing"))


def _tail(rng: random.Random) -> list[int]:
    return [rng.randint(500, 502) for _ in range(rng.randrange(4))]
