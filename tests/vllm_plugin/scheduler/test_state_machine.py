"""vLLM's scheduler and its KV-cache manager under random events, with jointkv and a worker that has no model."""

from __future__ import annotations

import gc
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

pytest.importorskip("vllm")

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import core as engine_core
from vllm.v1.request import Request
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor

from jointkv.vllm_plugin import engine_args
from jointkv.vllm_plugin.scheduler import side as scheduler_side
from jointkv.vllm_plugin.worker import side
from tests.effort import MACHINE_STEPS, machine_settings
from tests.vllm_plugin.engines import BOLD, write_model
from tests.vllm_plugin.scheduler.fake_second_runner import SecondRunner, write, write_all
from tests.vllm_plugin.scheduler.fake_worker import Comparer, Mail, Model, Runner, executor_of, packed_pages
from tests.vllm_plugin.scheduler.oracle import ABORTED, Oracle
from tests.vllm_plugin.scheduler.reuse_oracle import ReuseOracle

BLOCK = 4
PAGES = 30
"""For every layer group; a request of `LONGEST` tokens needs 16."""

LONGEST = 64
MOST = 12
"""Requests at a time."""

CHUNK = 16
TEXTS = [[100 * (number + 1) + place % CHUNK for place in range(40)] for number in range(2)]
"""They repeat themselves, so that chunks of one request are alike."""

SALTS = (None, None, "red", "blue")
IN_CHUNKS = {"chunk_tokens": CHUNK}

EARNED_SOON = {"reuse": "licensed", "reuse_miss_rate": 0.9, "reuse_confidence": 0.3, "reuse_audit_rate": 0.2}

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one table": ({}, {}),
    "two groups": ({"layer_groups": 2}, {}),
    "chunks": ({"scope": "chunk", **IN_CHUNKS}, {}),
    "two groups, chunks, strict": ({"layer_groups": 2, "scope": "both", "isolation": "strict", **IN_CHUNKS}, {}),
    "asynchronous": ({"scope": "both", **IN_CHUNKS}, {"async_scheduling": True}),
    "asynchronous, two groups": ({"layer_groups": 2, "max_candidates": 1}, {"async_scheduling": True, "apart": True}),
    "second runner": ({"scope": "both", **IN_CHUNKS}, {"second_runner": True}),
    "second runner, asynchronous, two groups": (
        {"layer_groups": 2},
        {"second_runner": True, "async_scheduling": True, "apart": True},
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
    "reuse, second runner": ({"reuse": "probed", "reuse_audit_rate": 0.1}, {"second_runner": True}),
    "reuse, second runner, asynchronous": (
        {"reuse": "probed", "reuse_audit_rate": 0.1, "scope": "both", **IN_CHUNKS},
        {"second_runner": True, "async_scheduling": True, "apart": True},
    ),
    "reuse, priorities, licence": (
        {**EARNED_SOON, "min_pool_usage": 0.5},
        {"scheduling_policy": "priority"},
    ),
}
"""Options of the plugin, and of the engine and its worker."""

FAULTS = {"lost": "is lost", "late": "is lost", "fault": "on purpose"}
"""Accidents of a verdict that switch fusion off, and what is said then."""

WHO = st.integers(0, MOST - 1)


def configuration(model: Path, fusion: dict[str, Any], options: dict[str, Any]) -> Any:
    """What the engine makes of its arguments."""
    attached = engine_args(**{"min_pool_usage": 0.0, "retry_after": 0.0, "max_faults": 16, **fusion})
    config = EngineArgs(
        str(model),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        block_size=BLOCK,
        num_gpu_blocks_override=1 + PAGES * fusion.get("layer_groups", 1),
        max_model_len=LONGEST,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        scheduling_policy=options.get("scheduling_policy", "fcfs"),
        kv_transfer_config=KVTransferConfig(**attached["kv_transfer_config"]),
        worker_cls=attached["worker_cls"],
        scheduler_cls=attached.get("scheduler_cls"),
    ).create_engine_config()
    # vLLM takes it back on the CPU.
    config.scheduler_config.async_scheduling = options.get("async_scheduling", False)
    return config


class SchedulerMachine(RuleBasedStateMachine):
    """One engine core and its requests. Everything is checked after every step and every event.

    Attributes:
        config: of the engine.
        totals: what happened in all runs.
    """

    config: ClassVar[Any]
    totals: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.mail = Mail()
        reuses = self.config.scheduler_config.scheduler_cls is not None
        self.oracle = (ReuseOracle if reuses else Oracle)(Model(), self.totals)
        runners: list[Runner] = []

        def make_runner(*configs: Any) -> Runner:
            runner = SecondRunner if self.config.use_v2_model_runner else Runner
            runners.append(runner(*configs, self.oracle.model, self.mail, self.oracle))
            return runners[0]

        self.core = engine_core.EngineCore(self.config, executor_of(make_runner), log_stats=False)
        self.oracle.attach(self.core, runners[0])
        assert self.core.scheduler.use_v2_model_runner == isinstance(runners[0], SecondRunner)
        self.oracle.side.reuse._draw = random.Random(0).random
        self.names = itertools.count()
        self.sound = True

    @property
    def requests(self) -> list[Request]:
        """Of clients."""
        return [one for name, one in self.core.scheduler.requests.items() if name not in self.oracle.side.helpers]

    def few(self) -> bool:
        return len(self.requests) < MOST

    def busy(self) -> bool:
        return bool(self.requests)

    def submit(self, prompt: list[int], out: int, salt: str | None, alone: bool, priority: int) -> None:
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
            arrival_time=float(number),
            cache_salt=salt,
            priority=priority,
            block_hasher=self.core.request_block_hasher,
        )
        self.oracle.admit(request)
        self.core.add_request(request)
        self.check()

    def check(self) -> None:
        self.sound = False
        self.oracle.check()
        self.sound = True

    def advance(self) -> None:
        """One step of the engine core."""
        self.sound = False
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
        self.check()

    @precondition(few)
    @rule(
        text=st.integers(0, len(TEXTS) - 1),
        head=st.integers(0, 5),
        length=st.integers(1, 40),
        tail=st.lists(st.integers(500, 502), max_size=3),
        out=st.integers(1, 20),
        salt=st.sampled_from(SALTS),
        alone=st.integers(0, 9).map(lambda dice: dice == 9),
        priority=st.integers(0, 2),
        count=st.integers(1, 3),
    )
    def admit(self, text, head, length, tail, out, salt, alone, priority, count) -> None:
        """Requests with the same text behind other heads are near; behind the same head they hit the prefix cache."""
        for number in range(count):
            self.submit([700 + head + number] * BLOCK + TEXTS[text][:length] + tail, out, salt, alone, priority)
        self.advance()

    @precondition(few)
    @rule(which=st.integers(0, 50), tail=st.lists(st.integers(500, 502), max_size=3), out=st.integers(1, 20))
    def next_turn(self, which, tail, out) -> None:
        """An earlier request again, with its answer so far and a new tail, under the same salt."""
        clients = self.oracle.clients
        if not clients:
            return
        earlier = clients[-1 - which % len(clients)].request
        prompt = [*earlier.all_token_ids, *tail]
        if len(prompt) < LONGEST:
            self.submit(prompt, out, earlier.cache_salt, which % 10 == 9, 1)

    @precondition(busy)
    @rule(count=st.integers(1, 8))
    def steps(self, count) -> None:
        for _ in range(count):
            self.advance()

    @precondition(busy)
    @rule(who=WHO, during=st.booleans())
    def abort(self, who, during) -> None:
        """Between two steps, or while the worker computes one."""
        request = self.requests[who % len(self.requests)]
        self.oracle.aborting.add(request.request_id)
        self.totals["aborted"] += 1
        if during:
            self.core.aborts_queue.put_nowait([request.request_id])
            self.advance()
        else:
            self.core.abort_requests([request.request_id])
            self.oracle.accounts[request.request_id].ended = ABORTED
            self.check()

    @precondition(lambda self: bool(self.core.scheduler.running))
    @rule(who=WHO)
    def preempt(self, who) -> None:
        """As a reset does with every running request."""
        scheduler = self.core.scheduler
        request = scheduler.running.pop(who % len(scheduler.running))
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        scheduler._preempt_request(request, 0.0, drop_stale_output=True)
        self.check()

    @precondition(busy)
    @rule(running=st.integers(0, 3).map(lambda dice: dice == 3), told=st.booleans())
    def reset(self, running, told) -> None:
        """Empty the prefix cache for new weights, which works only while nobody runs; the connector may be told."""
        if self.core.reset_prefix_cache(running, told):
            self.totals["resets"] += 1
            self.oracle.new_weights()
        self.check()

    @precondition(busy)
    @rule(pages=st.sets(st.integers(1, PAGES), max_size=6))
    def evict(self, pages) -> None:
        """Pages answer for no hash any more, in use or not."""
        if self.config.scheduler_config.policy == "priority":
            # Without fusion as well, vLLM preempts what it has scheduled in the same step, and the hash of a block that
            # was never computed stays. Only the order in which it reuses pages hides that, unless they lose hashes.
            pages = {page for page in pages if not self.oracle.pool.blocks[page].ref_cnt}
        self.core.scheduler.kv_cache_manager.evict_blocks(pages)
        self.check()

    @precondition(busy)
    @rule(accident=st.sampled_from(["twice"] * 6 + list(FAULTS)))
    def mishap(self, accident) -> None:
        """To the next verdict."""
        self.mail.accident = accident
        self.totals["accidents"] += 1
        self.oracle.expected_faults.add(FAULTS.get(accident, "nothing"))

    def teardown(self) -> None:
        """Every request is finished, then nothing is left."""
        try:
            if self.sound:
                for _ in range(4000):
                    if not self.core.scheduler.has_requests() and not self.core.batch_queue:
                        break
                    self.advance()
                self.oracle.check_drained()
        finally:
            ensure_kv_transfer_shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; only its config is read."""
    return write_model(tmp_path_factory.mktemp("unread"), 1.0, layers=1, heads=1, kv_heads=1)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What needs tensors or process groups is replaced. Numbers have no echoes, and are near more often than blocks."""
    monkeypatch.setattr(scheduler_side, "ReuseRule", BOLD)
    monkeypatch.setattr(side, "packed_pages", packed_pages)
    monkeypatch.setattr(side, "PageComparer", Comparer)
    monkeypatch.setattr(gpu_model_runner, "get_pp_group", lambda: SimpleNamespace(is_last_rank=True))
    monkeypatch.setattr(StagedWriteTensor, "apply_write", write)
    monkeypatch.setattr(FusedStagedWriter, "apply", write_all)
    monkeypatch.setattr(engine_core, "freeze_gc_heap", lambda: None)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.hazard(
    "State",
    "block tables, page pool, prefix cache and index of the engine fall out of step in some order of events",
    "pages and references always add up, no hash is answered wrongly, no salts meet, no request is lost",
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_scheduler_machine(
    variant: str, model: Path, no_model: None, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals: Counter[str] = Counter()
    config = configuration(model, *VARIANTS[variant])
    monkeypatch.setattr(Comparer, "is_apart", VARIANTS[variant][1].get("apart", False))
    second = VARIANTS[variant][1].get("second_runner", False)
    monkeypatch.setattr(type(config), "use_v2_model_runner", second)  # vLLM would ask for Triton
    machine = type("Machine", (SchedulerMachine,), {"config": config, "totals": totals})
    # Explaining a failure runs the engine under a tracer, which takes minutes; an example kept from an earlier failure
    # need not be one any more, and would be tried for ever.
    phases = set(Phase) - {Phase.explain}
    effort = settings(machine_settings(50), max_examples=6, derandomize=False, database=None, phases=phases)
    expected = {"approximate merges", "hits", "resumed", "finished", "aborted"}
    if config.scheduler_config.scheduler_cls is not None:
        expected |= {"helpers", "adopted", "reused"}
    most = MACHINE_STEPS  # those of the scheduler; some runs have few
    least = most / (1.5 * len(VARIANTS))
    while totals["steps"] < least or (totals["steps"] < most and not all(totals[name] for name in expected)):
        run_state_machine_as_test(machine, settings=effort)
    print(dict(totals))
    for name, count in totals.items():
        record_property(name, count)
    record_property("violations", 0)
    assert min(totals[name] for name in expected) > 0, totals
