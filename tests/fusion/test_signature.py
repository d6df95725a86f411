"""Signatures estimate distances and repeat in every process; token hashes are equal for equal text alone."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.core.blocks import PagedKV
from jointkv.fusion.signature import BlockSignature, token_hashes

LAYERS, PAGES = 30, 24
SHAPE = (16, 3, 64)
VOCABULARY = 50_000


def random_kv(seed=0, layers=LAYERS, shape=SHAPE, value_size=8, noise=0.1):
    """Pages around one centre: their distances are small beside their norms."""
    generator = torch.Generator().manual_seed(seed)

    def side(size):
        centre = torch.randn(1, *shape[:2], size, generator=generator)
        return centre + noise * torch.randn(PAGES, *shape[:2], size, generator=generator)

    return PagedKV([side(shape[2]) for _ in range(layers)], [side(value_size) for _ in range(layers)])


def true_distances(kv, first, second):
    """Mean over layers and over K and V of the squared distances of unit blocks, in float64."""
    total = torch.zeros(len(first), dtype=torch.float64)
    for layer in (*kv.keys, *kv.values):
        unit = torch.nn.functional.normalize(layer.flatten(1).double(), dim=1)
        total += (unit[first] - unit[second]).square().sum(1)
    return total / (2 * kv.num_layers)


@pytest.mark.parametrize("noise", [0.03, 0.3, 3.0])
def test_distances_of_signatures_estimate_those_of_the_blocks(noise):
    kv = random_kv(1, noise=noise)
    signature = BlockSignature(kv)
    four_deviations = 4 * (2 / signature.size) ** 0.5
    signatures = signature(kv, torch.arange(PAGES)).double()
    first, second = torch.combinations(torch.arange(PAGES)).T
    estimate = (signatures[first] - signatures[second]).square().sum(1)
    ratio = estimate / true_distances(kv, first, second)
    assert (ratio - 1).abs().max() < 1.5 * four_deviations  # 276 pairs
    assert abs(float(ratio.mean()) - 1) < four_deviations


@pytest.mark.parametrize(("layers", "size"), [(LAYERS, 32), (LAYERS, 64), (1, 32), (1, 200)])
def test_fewer_numbers_estimate_the_same_distances(layers, size):
    kv = random_kv(1, layers=layers, noise=0.3)
    first, second = torch.combinations(torch.arange(PAGES)).T
    truth = true_distances(kv, first, second)
    ratios = []
    for seed in range(8):  # the pairs of one seed are not independent
        signature = BlockSignature(kv, seed, size=size)
        found = signature(kv, torch.arange(PAGES))
        assert found.shape == (PAGES, size) and torch.allclose(
            found, signature.reference(kv, torch.arange(PAGES)), atol=1e-5
        )
        ratios.append((found[first] - found[second]).double().square().sum(1) / truth)
    ratio = torch.stack(ratios)
    assert abs(float(ratio.mean()) - 1) < 0.1
    assert float(ratio.std()) < 1.3 * (2 / size + 2 / BlockSignature(kv).size) ** 0.5


def test_keys_alone_may_make_a_signature():
    kv = random_kv(6, layers=4, noise=0.3, value_size=64)
    first, second = torch.combinations(torch.arange(PAGES)).T
    keys = PagedKV(kv.keys, kv.keys)
    signatures = BlockSignature(kv, size=128, similarity="key")(kv, torch.arange(PAGES))
    ratio = (signatures[first] - signatures[second]).square().sum(1) / true_distances(keys, first, second)
    assert abs(float(ratio.mean()) - 1) < 0.3
    other = PagedKV(kv.keys, [torch.randn_like(layer) for layer in kv.values])
    assert torch.equal(BlockSignature(kv, size=128, similarity="key")(other, torch.arange(PAGES)), signatures)


def test_signatures_do_not_see_the_length_of_a_block():
    kv = random_kv(2, layers=2)
    before = BlockSignature(kv)(kv, torch.arange(4))
    for layer in (*kv.keys, *kv.values):
        layer *= torch.rand(PAGES, 1, 1, 1) + 0.5
    assert torch.allclose(before, BlockSignature(kv)(kv, torch.arange(4)), atol=1e-6)


def test_every_instance_and_every_batch_gives_the_same_signatures():
    kv = random_kv(3, layers=2)
    pages = torch.tensor([5, 0, 5, 23])
    signature = BlockSignature(kv)
    whole = signature(kv, pages)
    assert whole.shape == (4, signature.size) and whole.dtype == torch.float32
    assert torch.equal(whole, BlockSignature(random_kv(9, layers=2))(kv, pages))
    alone = torch.cat([signature(kv, pages[i : i + 1]) for i in range(4)])
    assert torch.allclose(whole, alone, atol=1e-6)
    assert torch.equal(whole[0], whole[2])
    assert not torch.allclose(whole, BlockSignature(kv, seed=1)(kv, pages), atol=1e-2)


def test_no_pages_have_no_signatures():
    kv = random_kv(0, layers=2)
    signature = BlockSignature(kv)
    assert signature(kv, torch.zeros(0, dtype=torch.long)).shape == (0, signature.size)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [BlockSignature.__call__, BlockSignature.reference])
def test_blocks_that_are_no_numbers_have_no_finite_signature(poison, dtype, compute):
    for side in ("keys", "values"):
        kv = random_kv(4, layers=2)
        kv = PagedKV([layer.to(dtype) for layer in kv.keys], [layer.to(dtype) for layer in kv.values])
        getattr(kv, side)[1][7, 3, 1, 2] = poison
        finite = compute(BlockSignature(kv), kv, torch.arange(PAGES)).isfinite().all(1)
        assert finite.tolist() == [page != 7 for page in range(PAGES)]


@pytest.mark.parametrize("compute", [BlockSignature.__call__, BlockSignature.reference])
def test_zero_blocks_have_the_zero_signature(compute):
    kv = random_kv(5, layers=2)
    for layer in (*kv.keys, *kv.values):
        layer[3] = 0
    assert not compute(BlockSignature(kv), kv, torch.tensor([3])).any()


token_blocks = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=12)


@settings(max_examples=100)
@given(token_blocks)
def test_hashes_are_equal_exactly_when_the_tokens_are(blocks):
    hashes = token_hashes(torch.tensor(blocks).flatten(), 2).tolist()
    for i, first in enumerate(blocks):
        for j, second in enumerate(blocks):
            assert (hashes[i] == hashes[j]) == (first == second)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_many_random_and_neighbouring_blocks_do_not_collide(block_size):
    generator = torch.Generator().manual_seed(block_size)
    tokens = torch.randint(VOCABULARY, (20_000, block_size), generator=generator)
    place = torch.arange(10_000)
    neighbours = tokens[:10_000].clone()
    neighbours[place, place % block_size] += 1
    tokens = torch.cat((tokens, neighbours)).unique(dim=0)
    hashes = token_hashes(tokens, block_size).squeeze(1)
    assert len(hashes.unique()) == len(tokens)


@settings(max_examples=60)
@given(st.lists(st.integers(0, VOCABULARY), min_size=4, max_size=4, unique=True), st.permutations(range(4)))
def test_the_order_of_tokens_counts(tokens, order):
    original = torch.tensor(tokens)
    equal = int(token_hashes(original, 4)) == int(token_hashes(original[list(order)], 4))
    assert equal == (list(order) == [0, 1, 2, 3])


def test_hashes_keep_the_leading_shape_and_repeat_in_another_process():
    tokens = torch.arange(24).view(2, 12)
    hashes = token_hashes(tokens, 4)
    assert hashes.shape == (2, 3) and hashes.dtype == torch.long
    assert torch.equal(hashes[1], token_hashes(tokens[1], 4))
    assert torch.equal(hashes, token_hashes(tokens.int(), 4))
    program = (
        "import torch; from jointkv.fusion.signature import token_hashes;"
        "torch.rand(3); print(token_hashes(torch.arange(24).view(2, 12), 4).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(hashes.tolist())
