"""Any sequence of what a server does keeps pages, tables, indices and contents right: hf and core together."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jointkv.errors import PoolFull
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.policy import FusionPolicy
from tests.core.shadow import Content, read_block, same
from tests.effort import machine_settings
from tests.hf.tiny_models import build_model
from tests.machines.contexts import ROOT, VOCABULARY, Contexts
from tests.machines.invariants import check_contents, check_counts, check_indices, check_isolation
from tests.machines.serving import BLOCK, Batch, Server

LAYERS = 2
TENANTS = ("alice", "bob")
DOCUMENTS = ([1, 2, 3, 4, 5, 1, 3, 5, 2, 4], [2, 0, 2, 0, 4, 4, 1, 1, 3, 5])
MOST_BATCHES, MOST_ROWS, MOST_TOKENS = 5, 4, 24

GROUPS = st.sampled_from([1, "per_layer"])
BOUNDED = {
    "max_relative_error": st.sampled_from([0.3, 0.1, 0.0]),
    "max_token_error": st.sampled_from([None, 0.2, 0.4]),
    "across_layers": st.sampled_from(["rms", "max"]),
    "layer_groups": GROUPS,
    "candidates": st.sampled_from(["signature", "tokens", "both"]),
    "chunk_tokens": st.just(2 * BLOCK),
}
POLICIES = st.builds(FusionPolicy, **BOUNDED, scope=st.sampled_from(["batch", "chunk", "both"])) | st.builds(
    FusionPolicy,
    **{**BOUNDED, "max_relative_error": st.sampled_from([0.1, 0.3])},
    representative=st.just("direction"),
    key_threshold=st.just(0.9),
    value_threshold=st.just(0.8),
    scope=st.sampled_from(["batch", "chunk"]),
)

COUNTERS = ("blocks_considered", "blocks_fused", "pages_freed")

tally: Counter[str] = Counter()


class ServingMachine(RuleBasedStateMachine):
    """Batches of requests on one pool, which may be small."""

    model = build_model("llama", num_hidden_layers=LAYERS)

    def __init__(self) -> None:
        super().__init__()
        self.first_pages = patch("jointkv.core.pool.FIRST_PAGES", 4)
        self.first_pages.start()
        self.server: Server | None = None
        self.unseen = 0

    @initialize(
        policy=POLICIES,
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        noise=st.sampled_from([0.0, 0.1, 0.5, 0.8]),
        poison=st.sampled_from([0.0, 0.0, 0.05]),
        max_pages=st.sampled_from([None, None, 24, 40]),
    )
    def start(self, policy, dtype, noise, poison, max_pages):
        """`noise` as a share of the bound: near it, two errors one on top of the other are beyond."""
        pool = JointPool(self.model, policy, block_size=BLOCK, max_pages=max_pages)
        self.policy = policy
        self.server = Server(pool, Contexts(LAYERS, dtype, noise * (policy.max_relative_error or 0.1), poison), tally)
        pool.prepare(*(side[0] for side in self.server.contexts.states([[ROOT]])))
        self.server.follow()

    def teardown(self) -> None:
        self.first_pages.stop()
        if self.server is None:
            return
        server = self.server
        tally.update({name: server.pool.stats()[name] for name in COUNTERS})
        for holders in (server.running, server.finished, server.swapped):
            holders.clear()
        assert server.blocks.num_used == 0 and not server.blocks.references.any()
        assert len(server.prefixes) == 0 and all(len(fuser.index) == 0 for fuser in server.pool.fusers.values())

    # What the rules draw.

    def any_batch(self, data: Any, wanted: Callable[[Batch], bool] = lambda batch: True) -> Batch | None:
        """One that a rule can be applied to. Hypothesis leaves rules out at times, so two are always there."""
        while len(self.server.running) < 2:
            self.new_batch(data)
        found = [batch for batch in self.server.running if wanted(batch)]
        # A number: hypothesis would keep what it draws, and so the pages of an aborted batch.
        return found[data.draw(st.integers(0, len(found) - 1), label="batch")] if found else None

    def draw_text(self, data: Any) -> list[int]:
        head = data.draw(st.integers(0, 2), label="head")
        document = DOCUMENTS[data.draw(st.sampled_from([0, 0, 0, 1]), label="document")]
        return [head, *document[: data.draw(st.sampled_from([10, 10, 10, 9, 6, 3, 0]), label="length")]]

    def new_batch(self, data: Any) -> None:
        rows = data.draw(st.sampled_from([1, 1, 1, 2, 3]), label="rows")
        tenants = [data.draw(st.sampled_from((*TENANTS, TENANTS[0])), label="tenant") for _ in range(rows)]
        texts = [self.draw_text(data) for _ in tenants]
        batch = self.server.admit(tenants, texts, data.draw(st.booleans(), label="hit"))
        self.feed(batch, data.draw(st.sampled_from([11, 8, 5, 1]), label="first chunk"))

    # What a server does.

    @precondition(lambda self: len(self.server.running) < MOST_BATCHES)
    @rule(data=st.data())
    def admit(self, data):
        self.new_batch(data)

    def feed(self, batch: Batch, count: int, layers: int | None = None) -> None:
        """Read the next columns of the prompts."""
        if batch.waiting[0] and self.server.feed(batch, [row[:count] for row in batch.waiting], layers):
            batch.waiting = [row[count:] for row in batch.waiting]

    @rule(data=st.data(), count=st.sampled_from([8, 3, 1]))
    def chunk(self, data, count):
        batch = self.any_batch(data, lambda batch: bool(batch.waiting[0]))
        if batch:
            self.feed(batch, count)

    @rule(data=st.data(), steps=st.integers(1, 3))
    def decode(self, data, steps):
        batch = self.any_batch(data, lambda batch: not batch.waiting[0] and len(batch.mask[0]) < MOST_TOKENS)
        for _ in range(steps if batch else 0):
            tokens = st.integers(0, VOCABULARY - 1)
            self.server.feed(batch, [[data.draw(tokens, label="token")] for _ in batch.tenants])
            tally["tokens_decoded"] += 1

    @rule(data=st.data())
    def fail_between_layers(self, data):
        batch = self.any_batch(data, lambda batch: bool(batch.waiting[0]))
        if batch:
            self.feed(batch, 3, layers=1)

    @rule(data=st.data())
    def reorder(self, data):
        batch = self.any_batch(data, lambda batch: bool(batch.cache.tables))
        if batch:
            rows = st.lists(st.integers(0, len(batch.tenants) - 1), min_size=1, max_size=MOST_ROWS)
            picked = data.draw(rows, label="rows")
            batch.cache.batch_select_indices(torch.tensor(picked))
            batch.select(picked)

    @precondition(lambda self: len(self.server.running) < MOST_BATCHES)
    @rule(data=st.data())
    def branch(self, data):
        batch = self.any_batch(data)
        if batch:
            twin = copy.copy(batch)
            twin.cache = copy.deepcopy(batch.cache)
            twin.select(range(len(batch.tenants)))
            self.server.running.append(twin)

    @rule(data=st.data())
    def crop(self, data):
        batch = self.any_batch(data, lambda batch: bool(batch.mask[0]) and not batch.waiting[0])
        if batch:
            count = data.draw(st.integers(1, min(6, len(batch.mask[0]))), label="tokens")
            batch.crop(count)
            batch.cache.crop(-count)

    @rule(data=st.data(), swap=st.sampled_from([True, True, False]))
    def preempt(self, data, swap):
        """Swap a batch out, or forget what was computed and queue it again with all it has said."""
        batch = self.any_batch(data, lambda batch: bool(batch.cache.tables))
        if batch is None:
            return
        self.server.running.remove(batch)
        tally["preemptions"] += 1
        if swap:
            self.server.swapped.append((batch, batch.cache.state(), self.served_blocks(batch.cache)))
            batch.cache = None
        elif not any(batch.waiting):
            self.server.admit(batch.tenants, batch.texts, hit=True)

    def served_blocks(self, cache: JointCache) -> dict[tuple[int, int, int], Content]:
        """What served blocks read, by group, row and slot."""
        return {
            (group, row, slot): read_block(self.server.blocks, table, row, slot)
            for group, table in enumerate(cache.tables)
            for row, slot in table.served.nonzero().tolist()
        }

    @precondition(lambda self: self.server.swapped and len(self.server.running) < MOST_BATCHES)
    @rule()
    def resume(self):
        batch, tensors, served = self.server.swapped[0]
        cache = JointCache(self.server.pool, list(batch.tenants))
        try:
            cache.restore(len(batch.mask[0]), tensors)
        except PoolFull:
            tally["pool_full"] += 1
            return
        for (group, *entry), content in served.items():
            found = read_block(self.server.blocks, cache.tables[group], *entry)
            assert same(found, content), "a second error on top of the first"
        batch.cache = cache
        self.server.swapped.pop(0)
        self.server.running.append(batch)

    @rule(data=st.data(), chance=st.integers(0, 3))
    def abort(self, data, chance):
        batch = self.any_batch(data) if chance == 0 else None
        if batch:
            self.server.running.remove(batch)
            tally["aborts"] += 1

    @rule(data=st.data())
    def finish(self, data):
        """The cache stays, for later hits."""
        batch = self.any_batch(data, lambda batch: not batch.waiting[0])
        if batch:
            self.server.running.remove(batch)
            self.server.finished.append(batch)

    @precondition(lambda self: self.server.finished)
    @rule(data=st.data())
    def evict(self, data):
        self.server.finished.pop(data.draw(st.integers(0, len(self.server.finished) - 1)))

    @rule(data=st.data(), chance=st.integers(0, 3))
    def reset(self, data, chance):
        """One cache starts anew, with other prompts."""
        batch = self.any_batch(data) if chance == 0 else None
        if batch:
            batch.cache.reset()
            assert batch.cache.references == 0
            given = batch.cache.isolation_key
            tenants = given if isinstance(given, list) else [given]
            again = self.server.admit(list(tenants), [self.draw_text(data) for _ in tenants], hit=False)
            again.cache = batch.cache
            self.server.running.remove(batch)

    @rule(chance=st.integers(0, 4))
    def reset_prefix_cache(self, chance):
        """As after new weights: nothing that is resident may be found again."""
        if chance:
            return
        self.server.prefixes.clear()
        for fuser in self.server.pool.fusers.values():
            fuser.index.clear()

    @rule(steps=st.integers(1, 4))
    def look_away(self, steps):
        """Whoever counts pages frees what was dropped, and so would hide that somebody else forgot to."""
        self.unseen = steps

    # What holds after every step.

    @precondition(lambda self: self.server is not None)
    @invariant()
    def all_is_well(self):
        tally["steps"] += 1
        assert self.server.pool.faults == 0
        self.unseen -= 1
        if self.unseen > 0:
            return
        check_counts(self.server)
        check_indices(self.server, check_isolation(self.server))
        if self.server.holders:
            check_contents(self.server, self.policy)


def test_a_cache_that_was_cropped_to_nothing_comes_back():
    """Swapping it in again failed with an IndexError: its table had slots, and it had no page at all."""
    pool = JointPool(ServingMachine.model, "safe", block_size=BLOCK)
    server = Server(pool, Contexts(LAYERS, torch.float32, 0.0, 0.0), Counter())
    pool.prepare(*(side[0] for side in server.contexts.states([[ROOT]])))
    batch = server.admit(["alice"], [[1, 2, 3]], hit=False)
    assert server.feed(batch, batch.waiting)
    batch.crop(3)
    batch.cache.crop(-3)
    again = JointCache(pool, ["alice"])
    again.restore(0, batch.cache.state())
    batch.cache = again
    check_counts(server)
    assert server.feed(batch, [[1, 2, 3]])
    check_counts(server)
    check_contents(server, pool.policy)


AREA, HAZARD = "State", "requests come, go, branch, are cropped, preempted and resumed in any order (transformers)"


@pytest.mark.timeout(0)
@pytest.mark.hazard(AREA, HAZARD, "references are table entries, free and used pages add up, no page is both")
@pytest.mark.hazard(AREA, HAZARD, "no index names a page that was freed or written; exact hits read exact pages")
@pytest.mark.hazard(AREA, HAZARD, "every block is within its bound of what was written; errors do not add up")
@pytest.mark.hazard(AREA, HAZARD, "tenants never share a page")
def test_any_sequence_of_what_a_server_does(record_property):
    tally.clear()
    happened = ("blocks_fused", "pages_freed", "blocks_hit", "preemptions", "aborts", "tokens_decoded", "pool_full")
    for _ in range(3):  # by chance a rule may never have an effect
        run_state_machine_as_test(ServingMachine, settings=machine_settings(40))
        if all(tally[name] for name in happened):
            break
    for name, count in tally.items():
        record_property(name, count)
    assert all(tally[name] for name in happened), f"rules that never had an effect prove nothing: {tally}"
