"""Online fusion over streams of requests that come, grow, fork, are rewritten and go."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.core.plan import FusionPlan
from jointkv.core.pool import BlockPool
from jointkv.core.table import BlockTable
from jointkv.fusion.fuser import Fuser, NewBlocks
from jointkv.policy import FusionPolicy
from tests.core.shadow import naive_error, naive_token_error
from tests.fusion.strategies import Block, read_block, write_block

LAYERS, TOKENS, HEADS, SIZE = 3, 2, 1, 6
BLOCK = TOKENS * HEADS * SIZE
TENANTS = ("alice", "bob")
BOUND_ROUNDING = 1e-6


@dataclass
class Request:
    """Rows of one table: whose they are, and what was written to each block."""

    table: BlockTable
    tenants: list[str]
    written: dict[tuple[int, int], Block] = field(default_factory=dict)


class Server:
    """A pool with a fuser; checks after every operation everything that must always hold."""

    def __init__(self, policy: FusionPolicy, seed: int, *, noise: float, clusters: int, poison: float) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.policy, self.noise, self.poison = policy, noise, poison
        self.pool = BlockPool(LAYERS, TOKENS, (HEADS, SIZE), (HEADS, SIZE))
        self.fuser = Fuser(self.pool, policy)
        self.pool.on_free(self.gone_from_the_index)
        # The same centres at every position and for every tenant, so that buckets could be mixed up.
        self.centres = torch.randn(clusters, 2, LAYERS, BLOCK, generator=self.generator)
        self.requests: list[Request] = []
        self.not_finite = self.fused = self.freed = 0

    def gone_from_the_index(self, pages):
        assert not self.fuser.index.contains(pages).any()

    def random(self, high):
        return int(torch.randint(high, (), generator=self.generator))

    def write(self, request, row, slot):
        """Fill a page of the block's own; returns the cluster that its content comes from."""
        cluster = self.random(len(self.centres))
        noise = self.noise * torch.randn(2, LAYERS, BLOCK, generator=self.generator)
        content = self.centres[cluster] + noise
        if torch.rand((), generator=self.generator) < self.poison:
            content[self.random(2), self.random(LAYERS), 0] = (torch.nan, torch.inf)[self.random(2)]
        write_block(self.pool, int(request.table.pages[row, slot]), *content)
        request.written[row, slot] = read_block(request.table, row, slot)
        return cluster

    def fuse(self, request, blocks, clusters):
        if not blocks:
            return FusionPlan.empty()
        row, slot = torch.tensor(blocks).T
        buckets = [(request.tenants[r], s) for r, s in blocks]
        keys = list(dict.fromkeys(buckets))
        which = torch.tensor([keys.index(bucket) for bucket in buckets])
        tokens = torch.tensor(clusters) % 2  # some blocks of different content claim to be the same text
        pages = request.table.pages[row, slot]
        used, counters = self.pool.num_used, self.fuser.counters.copy()
        plan = self.fuser.fuse(request.table, NewBlocks(row, slot, keys, which, tokens))
        gained = self.fuser.counters - counters
        assert gained["blocks_considered"] <= len(pages.unique())
        assert gained["blocks_fused"] == plan.pages_released
        assert gained["pages_freed"] == used - self.pool.num_used
        assert self.fuser.index.contains(request.table.pages[row, slot])[self.finite(request, blocks)].all()
        return plan

    def finite(self, request, blocks):
        sides = [[torch.tensor(side).isfinite().all() for side in request.written[block]] for block in blocks]
        return torch.tensor(sides).all(1)

    # What clients do.

    def arrive(self, rows, blocks):
        tenants = [TENANTS[self.random(2)] for _ in range(rows)]
        request = Request(BlockTable(self.pool, rows), tenants)
        self.requests.append(request)
        self.grow(request, blocks)

    def grow(self, request, blocks):
        """Fill `blocks` more blocks of each row and fuse them."""
        have = request.table.num_blocks().tolist()
        request.table.extend(request.table.num_blocks() + blocks)
        new = [(row, start + i) for row, start in enumerate(have) for i in range(blocks)]
        self.fuse(request, new, [self.write(request, *block) for block in new])

    def rewrite(self, request):
        """Write to a full block once more, as after a crop."""
        have = request.table.num_blocks().tolist()
        row = self.random(len(have))
        if not have[row]:
            return
        slot = self.random(have[row])
        page = request.table.make_writable(torch.tensor([row]), torch.tensor([slot]))
        self.fuser.forget(page)
        self.check()
        self.fuse(request, [(row, slot)], [self.write(request, row, slot)])

    def fork(self, request):
        rows = [self.random(request.table.num_rows) for _ in range(1 + self.random(3))]
        request.table.select(torch.tensor(rows))
        old = request.written
        request.written = {(i, s): b for i, row in enumerate(rows) for (r, s), b in old.items() if r == row}
        request.tenants = [request.tenants[row] for row in rows]

    def crop(self, request):
        keep = torch.tensor([self.random(4) for _ in range(request.table.num_rows)])
        request.table.truncate(keep)
        request.written = {(r, s): b for (r, s), b in request.written.items() if s < keep[r]}

    def leave(self, request):
        request.table.release()
        self.requests.remove(request)

    def step(self, action, pick):
        if action == "arrive" or not self.requests:
            self.arrive(1 + self.random(3), self.random(4))
        else:
            request = self.requests[pick % len(self.requests)]
            getattr(self, action)(request, *([1] if action == "grow" else []))
        self.check()

    # What must hold.

    def check(self):
        self.pool.check_integrity()
        self.fuser.check_integrity()
        readers: dict[int, set[object]] = {}
        for request in self.requests:
            request.table.check_integrity()
            for (row, slot), written in request.written.items():
                page = int(request.table.pages[row, slot])
                readers.setdefault(page, set()).add((request.tenants[row], slot))
                if self.finite(request, [(row, slot)]).all():
                    self.check_bound(read_block(request.table, row, slot), written)
                else:
                    assert not self.fuser.index.contains(torch.tensor([page])).any()
        assert all(len(buckets) == 1 for buckets in readers.values()), "a page serves two buckets"

    def check_bound(self, read, written):
        for side in (0, 1):
            error = naive_error(written[side], read[side], self.policy.across_layers)
            assert error <= self.policy.max_relative_error + BOUND_ROUNDING
            error = naive_token_error(written[side], read[side], TOKENS, self.policy.across_layers)
            assert error <= self.policy.max_token_error + BOUND_ROUNDING


ACTIONS = ["arrive", "arrive", "grow", "grow", "fork", "crop", "rewrite", "leave"]
streams = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 9)), min_size=3, max_size=14)
policies = st.builds(
    FusionPolicy,
    max_relative_error=st.sampled_from([0.0, 0.05, 0.2]),
    max_token_error=st.sampled_from([0.0, 0.1, 0.3]),
    across_layers=st.sampled_from(["rms", "max"]),
    candidates=st.sampled_from(["signature", "tokens", "both"]),
    max_candidates=st.integers(1, 4),
    key_threshold=st.sampled_from([None, 0.99]),
    value_threshold=st.sampled_from([None, 0.99]),
) | st.builds(
    FusionPolicy,
    representative=st.just("direction"),
    max_relative_error=st.sampled_from([0.05, 0.2]),
    key_threshold=st.sampled_from([0.9, 0.999]),
    value_threshold=st.sampled_from([0.5, 0.99]),
    candidates=st.sampled_from(["signature", "tokens"]),
)


@settings(max_examples=120)
@given(
    policies,
    streams,
    st.integers(0, 2**16),
    st.sampled_from([0.0, 0.02, 0.1, 0.3]),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.15]),
)
def test_every_served_block_is_within_the_bound_of_its_own_bucket(policy, stream, seed, noise, clusters, poison):
    server = Server(policy, seed, noise=noise, clusters=clusters, poison=poison)
    for action, pick in stream:
        server.step(action, pick)
    for request in list(server.requests):
        server.leave(request)
    server.check()
    assert server.pool.num_used == 0 and len(server.fuser.index) == 0


@settings(max_examples=40)
@given(streams, st.integers(0, 2**16), st.sampled_from(["signature", "both"]), st.integers(1, 4))
def test_exact_copies_share_one_page_per_bucket_across_calls(stream, seed, candidates, count):
    policy = FusionPolicy(max_relative_error=0.0, candidates=candidates, max_candidates=count)
    server = Server(policy, seed, noise=0.0, clusters=3, poison=0.0)
    for action, pick in stream:
        server.step(action, pick)
    contents = {
        (request.tenants[row], slot, block[0].tobytes())
        for request in server.requests
        for (row, slot), block in request.written.items()
    }
    assert server.pool.num_used == len(contents)


def two_requests(policy, *, noise=0.0, poison=0.0):
    """Two calls of one row and two blocks each, of one cluster; everybody is alice."""
    server = Server(policy, 0, noise=noise, clusters=1, poison=poison)
    plans = []
    for _ in range(2):
        request = Request(BlockTable(server.pool, 1), ["alice"])
        server.requests.append(request)
        request.table.extend(torch.tensor([2]))
        blocks = [(0, 0), (0, 1)]
        plans.append(server.fuse(request, blocks, [server.write(request, *block) for block in blocks]))
        server.check()
    return server, plans


@pytest.mark.parametrize("kind", ["resident", "direction"])
def test_a_later_call_is_served_by_pages_of_an_earlier_one(kind):
    policy = FusionPolicy(representative=kind, key_threshold=0.9, value_threshold=0.9)
    server, (first, second) = two_requests(policy, noise=0.01)
    assert first.pages_released == 0 and second.pages_released == 2
    assert server.pool.num_used == 2
    earlier, later = server.requests
    server.leave(earlier)
    server.check()
    server.leave(later)
    assert len(server.fuser.index) == 0


def test_a_later_call_keeps_its_own_norms_under_an_earlier_direction():
    policy = FusionPolicy(representative="direction", key_threshold=0.9, value_threshold=0.9)
    server = Server(policy, 0, noise=0.01, clusters=1, poison=0.0)
    for rows, magnitude in ((2, 1.0), (1, 3.0)):
        request = Request(BlockTable(server.pool, rows), ["alice"] * rows)
        server.requests.append(request)
        request.table.extend(torch.ones(rows, dtype=torch.long))
        server.centres *= magnitude
        blocks = [(row, 0) for row in range(rows)]
        plan = server.fuse(request, blocks, [server.write(request, *block) for block in blocks])
        server.check()
        assert plan.pages_released == 1
    assert server.pool.num_used == 1
    for read, written in zip(read_block(request.table, 0, 0), request.written[0, 0], strict=True):
        np.testing.assert_allclose(np.linalg.norm(read, axis=1), np.linalg.norm(written, axis=1), rtol=1e-5)


def test_fusing_the_same_blocks_again_does_nothing():
    server, _ = two_requests(FusionPolicy(), noise=0.01)
    considered = server.fuser.counters["blocks_considered"]
    for request in server.requests:
        assert not len(server.fuse(request, [(0, 0), (0, 1)], [0, 0]))
    assert server.fuser.counters["blocks_considered"] == considered


def test_planning_changes_no_table_and_no_pool():
    server, _ = two_requests(FusionPolicy(), noise=0.01)
    request = Request(BlockTable(server.pool, 2), ["alice", "alice"])
    request.table.extend(torch.tensor([1, 1]))
    for row in (0, 1):
        server.write(request, row, 0)
    zeros = torch.zeros(2, dtype=torch.long)
    blocks = NewBlocks(torch.arange(2), zeros, [("alice", 0)], zeros)
    pages, references = request.table.pages.clone(), server.pool.references.clone()
    signatures = server.fuser.signature(server.pool.kv, pages[:, 0])
    resident = server.fuser.plan_resident(request.table, blocks, signatures)
    merged = server.fuser.plan_new(request.table, blocks)
    assert len(resident) == 2 and len(merged) == 1
    assert torch.equal(request.table.pages, pages) and torch.equal(server.pool.references, references)


def test_blocks_that_are_no_numbers_are_counted_and_left_alone():
    server, _ = two_requests(FusionPolicy(), poison=1.0)
    assert server.fuser.counters["blocks_not_finite"] == 4
    assert server.pool.num_used == 4 and len(server.fuser.index) == 0


def test_candidates_that_break_the_bound_are_counted():
    policy = FusionPolicy(max_relative_error=0.0, candidates="tokens")
    server, (_, second) = two_requests(policy, noise=0.01)
    assert not len(second)
    assert server.fuser.counters["rejected_by_bound"] == 2
