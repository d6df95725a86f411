"""Whatever caches come and go, also in the middle of another's prefill, each holds what its own prompt says.

The model's attention adds nothing, so that K and V are known by token and position, and may be read from anywhere
within bounds that are nearly 0: what differs is a page that holds something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

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
from torch import Tensor
from transformers import PreTrainedModel

from jointkv.errors import PoolFull
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.hf.reuse import ReuseOptions
from jointkv.hf.row_steps import Forward
from jointkv.policy import FusionPolicy
from jointkv.policy.reuse import ReuseRule
from tests.effort import machine_settings
from tests.hf.reusing import dense, text
from tests.hf.tiny_models import BLOCK, build_model

CLOSE = FusionPolicy(max_relative_error=1e-3, max_token_error=1e-3)
DOCUMENTS = [text(10 * BLOCK, seed) for seed in (1, 2)]
MOST_CACHES, STEPS_PER_RUN = 4, 25

PROMPTS = st.builds(
    lambda header, seed, document, start, length, tail: torch.cat(
        (text(header, 50 + seed), DOCUMENTS[document][start : start + length], text(tail, 80 + seed))
    ),
    *(st.sampled_from([0, 1, 3, BLOCK, BLOCK + 1, 2 * BLOCK]), st.integers(0, 3), st.integers(0, 1)),
    *(st.sampled_from([0, BLOCK, 5]), st.integers(4 * BLOCK, 10 * BLOCK), st.integers(1, 2 * BLOCK)),
)

HAZARD = "caches that prompts are read from are dropped at any moment (transformers, reuse)"

tally: Counter[str] = Counter()


@pytest.fixture(scope="module")
def forgetful() -> PreTrainedModel:
    """A model whose K and V depend on token and position alone."""
    model = build_model("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    return model


class PrefillMachine(RuleBasedStateMachine):
    model: PreTrainedModel

    def __init__(self) -> None:
        super().__init__()
        self.caches: list[tuple[JointCache, Tensor]] = []

    @initialize(
        moved=st.booleans(), most=st.sampled_from([None, None, 30]), fuses=st.booleans(), seed=st.integers(0, 99)
    )
    def make_pool(self, moved: bool, most: int | None, fuses: bool, seed: int) -> None:
        options = ReuseOptions("probed", audit_rate=0.3, rule=ReuseRule(echoes=False), seed=seed, moved=moved)
        self.pool = JointPool(self.model, CLOSE, block_size=BLOCK, max_pages=most, reuse=options)
        if not fuses:
            dense(self.model, text(1, 0), JointCache(self.pool))  # the first forward pass makes them
            for fuser in self.pool.fusers.values():
                fuser.close()
            self.pool.fusers = {}

    @rule(prompt=PROMPTS, dropped=st.none() | st.tuples(st.integers(0, 3), st.integers(0, MOST_CACHES - 1)))
    def prefill(self, prompt: Tensor, dropped: tuple[int, int] | None) -> None:
        """`dropped`: before which forward pass another cache goes, and which."""
        tally["steps"] += 1
        if len(self.caches) == MOST_CACHES:
            self.drop(0)
        calls, compute = 0, Forward.__call__

        def computing(forward: Forward, **inputs: object) -> None:
            nonlocal calls
            if dropped is not None and calls == dropped[0]:
                self.drop(dropped[1])
                tally["dropped meanwhile"] += 1
            calls += 1
            compute(forward, **inputs)

        cache = JointCache(self.pool)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Forward, "__call__", computing)
            try:
                done = cache.prefill(self.model, prompt[None])
            except PoolFull:
                assert self.pool.max_pages is not None
                tally["full"] += 1
                return
        assert self.pool.reuse is not None, "no fault"
        tally.update(skipped=done.skipped > 0, moved=done.moved > 0, exact=done.exact > 0)
        tally["audited"] += done.rows[0].audited_blocks > 0
        assert done.missed_blocks == 0
        self.caches.append((cache, prompt))
        self.check()

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, MOST_CACHES - 1))
    def drop(self, which: int) -> None:
        tally["steps"] += 1
        if which < len(self.caches):
            del self.caches[which]

    def check(self) -> None:
        """What every cache holds is what its prompt says."""
        for cache, prompt in self.caches:
            assert cache.length == len(prompt) - 1
            for layer, true in enumerate(dense(self.model, prompt[:-1]).layers):
                for found, expected in zip(cache.batch.read(layer), (true.keys, true.values), strict=True):
                    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)

    @invariant()
    def counts_are_right(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            self.caches.clear()
            assert not self.pool.blocks or self.pool.blocks.num_used == 0


@pytest.mark.timeout(0)
@pytest.mark.hazard("State", HAZARD, "each prompt holds what its own text says; references are those of the caches")
def test_any_sequence_of_prompts(forgetful: PreTrainedModel, record_property: Callable[[str, object], None]) -> None:
    tally.clear()
    PrefillMachine.model = forgetful
    run_state_machine_as_test(PrefillMachine, settings=machine_settings(STEPS_PER_RUN))
    for name, count in tally.items():
        record_property(name, count)
    assert all(tally[name] for name in ("skipped", "moved", "exact", "audited", "dropped meanwhile", "full")), tally
