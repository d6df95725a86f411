"""Methods on the pages of a `JointPool`: fusion, exact prefixes, quantised pages."""

import dataclasses
from typing import Any

import pytest
import torch

from jointkv.errors import BadInput
from jointkv.evaluate.compare.comparison import run_methods
from jointkv.evaluate.methods import Fused, get_method
from jointkv.evaluate.methods.fused_quantized import QuantizedPages
from jointkv.policy import FusionPolicy
from tests.evaluate.methods.tiny_batches import (
    BLOCK,
    HEADS,
    LAYERS,
    PAGE_BYTES,
    PER_TOKEN,
    SIZE,
    batch_of,
    different,
    needs_hf,
    random_tokens,
    requests_of,
    same_start,
)

pytestmark = needs_hf

# 72, 73 and 74 tokens prefilled: 17 full blocks shared, then one or two of each request's own.
OWN_FULL = 3
STARTED = 2
SHARED = 17


def near_prefix():
    """Prompts whose first block differs and whose other tokens are the same, up to the last few."""
    text = random_tokens(60, 1)
    return requests_of(*(random_tokens(BLOCK, 20 + i) + text + random_tokens(3, 30 + i) for i in range(3)))


def test_exact_prefix_keeps_one_page_for_each_distinct_prefix_of_full_blocks():
    batch = batch_of(same_start())
    held: Any = get_method("exact_prefix").hold(batch, 1.0)
    assert held.counted == "allocator"
    assert held.nbytes == (SHARED + OWN_FULL + STARTED) * PAGE_BYTES
    held.cache.check_integrity()


def test_exact_prefix_finds_nothing_behind_a_block_that_differs():
    batch = batch_of(near_prefix())
    blocks = sum(-(-length // BLOCK) for length in batch.lengths)
    assert get_method("exact_prefix").hold(batch, 1.0).nbytes == blocks * PAGE_BYTES


def test_sharing_exact_prefixes_changes_no_answer():
    (row,) = run_methods(batch_of(same_start()), [(get_method("exact_prefix"), 1.0)], generate=4)
    assert row.share < 0.5 and row.kl_worst_request < 1e-6 and row.common_prefix == 4


def test_fused_takes_level_and_level_and_a_half_as_bounds():
    fused: Any = get_method("fused")
    paper: Any = get_method("paper")
    policy = fused.policy_at(0.2)
    assert policy.max_token_error == pytest.approx(0.3)
    assert dataclasses.replace(policy, max_token_error=0.3) == FusionPolicy.preset("safe")
    assert paper.policy_at(0.7) == FusionPolicy.preset("paper", key_threshold=0.7)


def test_fused_finds_behind_a_different_block_what_a_prefix_cache_cannot():
    batch = batch_of(near_prefix(), initializer_range=0.02)
    rows = list(
        run_methods(batch, [(get_method("exact_prefix"), 1.0), (get_method("fused"), 0.2), (get_method("fused"), 0.5)])
    )
    assert rows[0].share > 1 and rows[1].share < 0.9 and rows[2].share < 0.6
    assert rows[2].kl < 1e-3


def test_a_policy_of_the_user_is_a_method():
    policy = FusionPolicy.preset("safe", max_relative_error=0.1, layer_groups=LAYERS)
    mine = Fused("mine", policy)
    assert (mine.name, mine.levels, mine.level_means) == ("mine", (0.1,), "max_relative_error")
    held: Any = mine.hold(batch_of(same_start()), 0.1)
    assert held.cache.pool.policy is policy
    assert held.nbytes == held.pages_after * PAGE_BYTES // LAYERS
    assert Fused("keys", FusionPolicy.preset("paper")).levels == (0.75,)
    assert Fused("none", FusionPolicy.preset("off")).levels == (0.0,)


def test_scales_of_shared_directions_are_counted():
    batch = batch_of(same_start())
    policy = FusionPolicy.preset("paper", key_threshold=0.99)
    held: Any = Fused("paper", policy).hold(batch, 0.99)
    scales = sum(
        scale.nbytes for table in held.cache.tables for scale in (table.k_scale, table.v_scale) if scale is not None
    )
    assert scales > 0 and held.nbytes == held.pages_after * PAGE_BYTES // LAYERS + scales


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bytes_of_quantised_pages(bits):
    requests = different()
    batch = batch_of(requests)
    held = get_method("quantized_pages").hold(batch, bits)
    full = sum(length // BLOCK for length in batch.lengths)
    codes = full * BLOCK * PER_TOKEN * bits // 8
    key_groups, value_groups = full * LAYERS * HEADS * SIZE, full * LAYERS * HEADS * BLOCK
    tail = sum(length % BLOCK for length in batch.lengths) * PER_TOKEN * 4
    assert held.nbytes_packed == codes + (key_groups + value_groups) * 4
    assert held.nbytes == held.nbytes_packed + tail


@pytest.mark.parametrize("name", ["quantized_pages", "fused_quantized"])
def test_prompts_without_a_full_block_are_held_as_they_are(name):
    batch = batch_of(requests_of(random_tokens(3, 1), random_tokens(4, 2)))
    (row,) = run_methods(batch, [(get_method(name), 8)], generate=2)
    assert row.not_run is None and row.nbytes == row.unfused_nbytes and row.kl < 1e-9


def test_a_fused_page_is_quantised_once():
    batch = batch_of(same_start())
    alone, fused = (get_method(name).hold(batch, 4) for name in ("quantized_pages", "fused_quantized"))
    blocks = sum(length // BLOCK for length in batch.lengths)
    per_page = alone.nbytes_packed // blocks
    assert alone.nbytes_packed == blocks * per_page
    assert fused.nbytes_packed == (SHARED + OWN_FULL) * per_page


def test_what_quantised_pages_give_back_is_near_what_was_held():
    batch = batch_of(different())
    held: Any = get_method("quantized_pages").hold(batch, 8)
    for request, cache in enumerate(batch.dense):
        for (keys, values), layer in zip(held.rebuild(request), cache.layers, strict=True):
            for given, true in ((keys, layer.keys), (values, layer.values)):
                assert given.shape == true.shape and (given - true).norm() <= 0.01 * true.norm()


def test_groups_of_layers_are_put_back_in_order():
    batch = batch_of(same_start())
    safe = FusionPolicy.preset("safe", max_relative_error=0.0)
    split = QuantizedPages("grouped", dataclasses.replace(safe, layer_groups=3))
    batches: list[Any] = [method.hold(batch, 8) for method in (split, QuantizedPages("one", safe))]
    for request in range(3):
        for ours, theirs in zip(*(held.rebuild(request) for held in batches), strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_fewer_bits_cost_more():
    method = get_method("fused_quantized")
    rows = list(run_methods(batch_of(same_start()), [(method, level) for level in method.levels]))
    assert rows[0].kl < rows[1].kl < rows[2].kl
    assert rows[0].share_16bit > rows[0].share  # float32 flatters it


def test_directions_are_not_quantised():
    with pytest.raises(BadInput, match="mine: only resident"):
        QuantizedPages("mine", FusionPolicy.preset("paper"))


@pytest.mark.real_model
@pytest.mark.slow
def test_fusion_on_near_prefix_traffic_beats_what_it_is_compared_with():
    from jointkv.evaluate.holding.batch import Batch
    from jointkv.evaluate.traffic import get_traffic
    from jointkv.hf.models import load_model

    model, tokenizer = load_model("smollm2", dtype="float32")
    batch = Batch(model, get_traffic("near_prefix").requests(tokenizer, 3, continuation_tokens=16))
    wanted = {"exact_prefix": 1.0, "fused": 0.2, "fused_quantized": 8, "quantized_pages": 8, "minicache": 0.5}
    rows = list(run_methods(batch, [(get_method(name), level) for name, level in wanted.items()]))
    by_name = {row.method: row for row in rows}
    assert by_name["fused"].kl < 0.001 and by_name["fused"].share < 0.6
    assert by_name["exact_prefix"].share >= 1 and by_name["exact_prefix"].kl < 1e-6
    assert by_name["fused_quantized"].share < 0.6 * by_name["quantized_pages"].share
    assert by_name["fused_quantized"].kl < 0.005
    assert by_name["minicache"].kl > 10 * by_name["fused"].kl and by_name["minicache"].share > by_name["fused"].share
