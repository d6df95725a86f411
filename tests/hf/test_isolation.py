"""Tenants of one `JointPool`: no page is shared across isolation keys, and no neighbour changes a tenant's logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.policy import FusionPolicy
from tests.hf.tiny_models import BLOCK, VOCABULARY, duplicates, generate, joint, prompts, step

POLICIES = {
    "resident": FusionPolicy(max_relative_error=0.9, max_token_error=None),
    "by text": FusionPolicy(max_relative_error=0.9, max_token_error=None, candidates="tokens"),
    "layer groups": FusionPolicy(max_relative_error=0.9, max_token_error=None, layer_groups=3),
    "chunks too": FusionPolicy(max_relative_error=0.9, max_token_error=None, scope="both", chunk_tokens=2 * BLOCK),
    "directions": FusionPolicy.preset("paper", skip_first_layers=0, skip_last_layers=0),
}
PROMPT = duplicates(1, 5 * BLOCK + 1)


def near(seed: int) -> tuple[Tensor, Tensor]:
    """The prompt with a first token of its own."""
    ids = PROMPT[0].clone()
    ids[0, 0] = 2 + seed % (VOCABULARY - 2)
    return ids, PROMPT[1]


class Served(NamedTuple):
    model: PreTrainedModel
    pool: JointPool


def read(served: Served, key: Any, seed: int = 0) -> JointCache:
    cache = JointCache(served.pool, key)
    step(served.model, cache, *near(seed))
    return cache


def pages(cache: JointCache) -> list[set[int]]:
    """Per row the pages it reads, of all layer groups."""
    return [
        {int(page) for table in cache.tables for page in table.pages[row] if page >= 0}
        for row in range(cache.batch_size)
    ]


def in_one_batch(served: Served, first: Any, second: Any, folder: Path) -> list[set[int]]:
    cache = JointCache(served.pool, [first, second])
    step(served.model, cache, torch.cat((near(0)[0], near(1)[0])))
    return pages(cache)


def while_the_other_lives(served: Served, first: Any, second: Any, folder: Path) -> list[set[int]]:
    caches = read(served, first), read(served, second, 1)
    return [*pages(caches[0]), *pages(caches[1])]


def while_decoding(served: Served, first: Any, second: Any, folder: Path) -> list[set[int]]:
    """Prompts without a full block in common; the tokens that follow are the same."""
    caches = [JointCache(served.pool, key) for key in (first, second)]
    for cache, seed in zip(caches, (3, 4), strict=True):
        step(served.model, cache, prompts(BLOCK, seed=seed)[0])
        for token in PROMPT[0][0, : 4 * BLOCK]:
            step(served.model, cache, token.view(1, 1))
    return [*pages(caches[0]), *pages(caches[1])]


def through_a_file(served: Served, first: Any, second: Any, folder: Path) -> list[set[int]]:
    """Saved by one tenant, loaded by another: the key is who loads it."""
    read(served, first).save(folder / "cache.safetensors")
    caches = JointCache.load(folder / "cache.safetensors", served.pool, second), read(served, first, 1)
    return [*pages(caches[0]), *pages(caches[1])]


def after_rows_were_chosen(served: Served, first: Any, second: Any, folder: Path) -> list[set[int]]:
    """The keys follow the rows."""
    cache = JointCache(served.pool, [first, second, "somebody", first])
    step(served.model, cache, prompts(*[BLOCK] * 4)[0])
    cache.batch_select_indices(torch.tensor([1, 3]))
    step(served.model, cache, PROMPT[0].repeat(2, 1))
    return pages(cache)


def after_a_reset(served: Served, first: Any, second: Any, folder: Path) -> list[set[int]]:
    caches = read(served, first), read(served, second, 1)
    for cache, seed in zip(caches, (5, 6), strict=True):
        cache.reset()
        step(served.model, cache, *near(seed))
    return [*pages(caches[0]), *pages(caches[1])]


WAYS: list[Callable[..., list[set[int]]]] = [
    in_one_batch,
    while_the_other_lives,
    while_decoding,
    through_a_file,
    after_rows_were_chosen,
    after_a_reset,
]


@pytest.mark.hazard(
    "Isolation",
    "caches of transformers with different isolation keys share a page",
    "never, however the two meet; with equal keys they do share",
)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_keys_keep_tenants_apart(
    way: Callable[..., list[set[int]]], policy: str, tmp_path: Path, record_property: Any
) -> None:
    for (first, second), together in {("red", "red"): True, ("red", "blue"): False, ("", "red"): False}.items():
        served = Served(*joint("llama", POLICIES[policy], initializer_range=0.05))
        ours, theirs = way(served, first, second, tmp_path)
        assert bool(ours & theirs) is together, (first, second)
        assert served.pool.faults == 0
        served.pool.check_integrity()
        record_property("shared_with_equal_keys" if together else "shared_across_keys", len(ours & theirs))


def test_a_copy_keeps_its_key() -> None:
    served = Served(*joint("llama", POLICIES["resident"], initializer_range=0.05))
    twin = copy.deepcopy(read(served, "red"))
    assert pages(twin)[0] & pages(read(served, "red", 1))[0]
    assert not pages(twin)[0] & pages(read(served, "blue", 2))[0]


def afresh(served: Served) -> Served:
    return Served(served.model, JointPool(served.model, served.pool.policy, block_size=BLOCK))


neighbours = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 90), st.sampled_from(["", "blue", 0]), st.booleans()), max_size=5
)


def logits(served: Served, beside: list[tuple[int, int, Any, bool]], key: Any = None) -> list[Tensor]:
    """The tenant's logits, between requests of neighbours: before which of its own, text, key, and whether it stays.

    With `key` the neighbours have that one.
    """
    kept, found = [], []
    for number in range(4):
        for _, seed, other, stays in (one for one in beside if one[0] == number):
            cache = read(served, other if key is None else key, seed)
            kept += [cache] * stays
        kept.append(JointCache(served.pool, "red"))
        found.append(step(served.model, kept[-1], *near(number)))
        found.append(step(served.model, kept[-1], torch.tensor([[number + 2]])))
    assert served.pool.faults == 0
    return found


@pytest.mark.hazard(
    "Isolation",
    "a neighbour with another isolation key changes a tenant's logits in transformers",
    "never: equal to the last bit",
)
@pytest.mark.parametrize("policy", ["resident", "directions"])
def test_a_neighbour_changes_nothing(policy: str) -> None:
    served = Served(*joint("llama", POLICIES[policy], initializer_range=0.05))
    alone = logits(served, [])
    assert served.pool.stats()["blocks_fused"] > 0

    @settings(max_examples=12)
    @given(neighbours)
    def compare(beside: list[tuple[int, int, Any, bool]]) -> None:
        found = logits(afresh(served), beside)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, alone, strict=True))

    compare()
    # With the tenant's key it would show.
    found = logits(afresh(served), [(0, 40, "", True)], key="red")
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(found, alone, strict=True))


def test_what_a_neighbour_in_the_batch_says_changes_nothing() -> None:
    found = {}
    for key in ("blue", "red"):
        for neighbour in (prompts(5 * BLOCK + 1, seed=8)[0], near(1)[0]):
            served = Served(*joint("llama", POLICIES["resident"], initializer_range=0.05))
            cache = JointCache(served.pool, [key, "red"])
            step(served.model, cache, torch.cat((neighbour, near(0)[0])))
            step(served.model, cache, torch.tensor([[5], [6]]))
            found.setdefault(key, []).append(step(served.model, cache, torch.tensor([[7], [7]]))[1])
    assert torch.equal(*found["blue"]) and not torch.equal(*found["red"])


def test_a_tuple_is_one_isolation_key() -> None:
    """Two tuples were read as one key per row, and their second halves met."""
    model, pool = joint("llama", "safe")
    caches = [JointCache(pool, ("organisation", name)) for name in ("alice", "bob")]
    for cache in caches:
        generate(model, duplicates(2, 16), cache)
    held = [set(table.held().tolist()) for cache in caches for table in cache.tables]
    assert not held[0] & held[1]
    assert all(cache.pages < cache.references for cache in caches)
