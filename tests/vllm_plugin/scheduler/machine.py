"""One engine core whose requests meet random events, and a worker that has no model."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

from vllm import SamplingParams
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
from vllm.v1.engine import core as engine_core
from vllm.v1.request import Request

from jointkv.vllm_plugin.engine.others import connectors
from tests.vllm_plugin.scheduler.fake_files import Files
from tests.vllm_plugin.scheduler.fake_pages import Model
from tests.vllm_plugin.scheduler.fake_second_runner import SecondRunner
from tests.vllm_plugin.scheduler.fake_worker import Mail, Runner, executor_of
from tests.vllm_plugin.scheduler.oracle import ABORTED, Oracle
from tests.vllm_plugin.scheduler.reuse_oracle import ReuseOracle
from tests.vllm_plugin.scheduler.variants import BLOCK, CHUNK, LONGEST

MOST = 12
"""Requests at a time."""

TEXTS = [[100 * (number + 1) + place % CHUNK for place in range(40)] for number in range(2)]
"""They repeat themselves, so that chunks of one request are alike."""

SALTS = (None, None, "red", "blue")

FAULTS = {"lost": "is lost", "late": "is lost", "fault": "on purpose"}
"""Accidents of a verdict that switch fusion off, and what is said then."""


class SchedulerMachine:
    """One engine core and its requests. All is checked after every step and every event, but while nobody looks.

    Args:
        config: of the engine.
        totals: what happens is added to it.

    Attributes:
        history: names of events so far.
        unseen: steps and events of which nothing is checked but what a worker reads: whoever looks might change it.
    """

    def __init__(self, config: Any, totals: Counter[str]) -> None:
        self.config, self.totals = config, totals
        self.history: list[str] = []
        self.unseen = 0
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
        if rng.random() < 0.1:
            self.unseen = rng.randint(1, 30)
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
        self._check()

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
        self._check()

    def preempt(self, request: Request) -> None:
        """As a reset does with every running request."""
        scheduler = self.core.scheduler
        scheduler.running.remove(request)
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        scheduler._preempt_request(request, 0.0, drop_stale_output=True)
        self._check()

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

    def _check(self) -> None:
        self.unseen -= 1
        if self.unseen < 0:
            self.oracle.check()

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
            self._check()

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
        self._check()

    def evict(self, rng: random.Random) -> None:
        """Pages answer for no hash any more, in use or not."""
        pages = {rng.randrange(1, len(self.oracle.pool.blocks)) for _ in range(rng.randrange(7))}
        if self.config.scheduler_config.policy == "priority":
            # Without fusion as well, vLLM preempts what it has scheduled in the same step, and the hash of a block that
            # was never computed stays. Only the order in which it reuses pages hides that, unless they lose hashes.
            pages = {page for page in pages if not self.oracle.pool.blocks[page].ref_cnt}
        self.core.scheduler.kv_cache_manager.evict_blocks(pages)
        self._check()

    def mishap(self, rng: random.Random) -> None:
        """To the next verdict."""
        accident = rng.choice(["twice"] * 6 + list(FAULTS))
        self.mail.accident = accident
        self.totals["accidents"] += 1
        self.oracle.expected_faults.add(FAULTS.get(accident, "nothing"))


def _tail(rng: random.Random) -> list[int]:
    return [rng.randint(500, 502) for _ in range(rng.randrange(4))]
