"""The kernel, its reference and `served_errors` agree on every dtype and order; without a compiler it still works."""

import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.core.blocks import served_errors
from jointkv.core.packed import PACKED_DTYPES, PackedPages
from jointkv.errors import LayoutError
from jointkv.fusion.kernels import cpu, kernels_for
from jointkv.fusion.pair_sums import pair_cosines, pair_errors, pair_sums, pair_sums_reference, with_own_norms
from jointkv.policy.rule import NOT_ASKED
from tests.core.packings import pack, row_major, shuffled, vnni
from tests.fusion.strategies import RESIDENT

ROUNDING = 1e-5
PAGES = 5
SOURCE = cpu.FOLDER / "pair_sums.c"
SCALES = torch.tensor([0.0, 1e-25, 1e-12, 1.0, 1.0, 1.0, 30.0])

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """No kernel has been built or asked for yet."""
    monkeypatch.setenv("JOINTKV_CACHE_DIR", str(tmp_path))
    kernels_for.cache_clear()
    yield tmp_path / "native"
    kernels_for.cache_clear()


def native_sums(pages, own, other):
    kernels = kernels_for("cpu")
    assert isinstance(kernels, cpu.Kernels)
    return kernels.pair_sums(pages, own, other)


@st.composite
def caches(draw):
    """A plain cache, the same one packed, and pairs of its pages: near-duplicates, tiny, zero and other tokens."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    slots = draw(
        st.sampled_from(
            [row_major(4, 5, 3), row_major(1, 1, 1), row_major(16, 64, 64), row_major(3, 40, 80), vnni(2, 32)]
        )
    )
    if draw(st.booleans()):
        slots = shuffled(slots, generator)
    tokens = int(slots.max() + 1) // 2
    centre = torch.randn(len(slots), generator=generator)
    noise = draw(st.sampled_from([0.0, 0.01, 0.3]))
    layers = []
    for _ in range(2 * draw(st.integers(1, 3))):
        size = int((slots < tokens).sum() if len(layers) % 2 == 0 else (slots >= tokens).sum())
        page = centre[:size] + noise * torch.randn(PAGES, size, generator=generator)
        scale = SCALES[torch.randint(len(SCALES), (PAGES, tokens, 1, 1), generator=generator)]
        scale = scale if draw(st.booleans()) else 1.0
        layers.append(page.view(PAGES, tokens, 1, -1) * scale)
    dtype, gap = draw(st.sampled_from(PACKED_DTYPES)), draw(st.sampled_from([0, 7]))
    pairs = torch.randint(PAGES, (2, draw(st.integers(1, 5))), generator=generator)
    return (*pack(layers[::2], layers[1::2], dtype, slots, gap), *pairs)


def truth(plain, own, other):
    """The sums by definition, in float64, without the care for tiny differences."""
    sides = []
    for vectors in plain.vectors(torch.arange(plain.num_pages)):
        tokens = vectors.double().unflatten(-1, (plain.block_size, -1))
        x, y = tokens[:, own], tokens[:, other]
        sides.append(torch.stack([part.square().sum(-1) for part in (x - y, x, y)], -1))
    return torch.stack(sides, 2).transpose(0, 1)


@settings(max_examples=100)
@given(cache=caches())
def test_the_reference_is_the_definition(cache):
    plain, pages, own, other = cache
    expected = truth(plain, own, other)
    torch.testing.assert_close(
        pair_sums_reference(pages, own, other).double(), expected, rtol=ROUNDING, atol=1e-37, equal_nan=True
    )


@needs_compiler
@settings(max_examples=200)
@given(cache=caches(), threads=st.sampled_from([1, 2, 3]))
def test_the_kernel_is_the_reference(cache, threads):
    _, pages, own, other = cache
    torch.set_num_threads(threads)
    found = native_sums(pages, own, other)
    torch.set_num_threads(1)
    expected = pair_sums_reference(pages, own, other)
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=1e-37, equal_nan=True)
    lifted = (expected[..., 0] > 0) & (expected[..., 1] < 1e-30)
    assert torch.equal((found[..., 0] > 0) & (found[..., 1] < 1e-30), lifted)


@needs_compiler
@pytest.mark.parametrize("dtype", PACKED_DTYPES[1:], ids=str)
def test_every_number_of_a_type_is_read_right(dtype):
    codes = torch.arange(2 ** (8 * dtype.itemsize)).to({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    tokens, page = len(codes) // 2, codes.view(dtype)
    layer = torch.stack((codes, torch.zeros_like(codes), codes.flip(0))).view(dtype)
    pages = PackedPages([layer], torch.arange(len(codes)) % tokens, torch.arange(len(codes)) >= tokens)
    own, other = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    found, expected = native_sums(pages, own, other), pair_sums_reference(pages, own, other)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)
    norms = torch.cat((found[0, 0, 0, :, 1], found[0, 0, 1, :, 1]))
    torch.testing.assert_close(norms, page.float().square(), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=150)
@given(cache=caches(), aggregate=st.sampled_from(["rms", "max"]), by_kernel=st.booleans())
def test_errors_are_those_of_a_plain_cache(cache, aggregate, by_kernel):
    plain, pages, own, other = cache
    sums = (pair_sums if by_kernel else pair_sums_reference)(pages, own, other)
    for mine, theirs in zip(pair_errors(sums, aggregate), served_errors(plain, own, other, aggregate), strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        finite = theirs.isfinite()
        torch.testing.assert_close(mine[finite], theirs[finite], rtol=1e-4, atol=1e-6)


@settings(max_examples=150)
@given(cache=caches())
def test_own_norms_bring_a_page_nearer_or_are_left_out(cache):
    plain, pages, own, other = cache
    plainly = pair_sums_reference(pages, own, other)
    sums, factors = with_own_norms(plainly)
    assert factors.shape == (len(own), pages.num_layers, 2) and (factors > 0).all() and factors.isfinite().all()
    by_side = []
    for side, vectors in enumerate(plain.vectors(torch.arange(plain.num_pages))):
        tokens = vectors.double().unflatten(-1, (plain.block_size, -1))
        x, y = tokens[:, own], tokens[:, other] * factors[:, :, side].T[..., None, None]
        by_side.append(torch.stack([part.square().sum(-1) for part in (x - y, x, y)], -1))
    expected = torch.stack(by_side, 2).transpose(0, 1)
    known = expected.isfinite()
    size = expected[..., 1:].sum(-1, keepdim=True).expand_as(expected)
    assert ((sums - expected).abs()[known] <= 1e-5 * size[known] + 1e-37).all()
    before, after = (part.sum(3)[..., 0] for part in (plainly, sums))
    assert (after <= before)[before.isfinite()].all()
    assert torch.equal((sums[..., 0] == 0).all(3), (plainly[..., 0] == 0).all(3)), "alike only where it was"
    kept = (factors != 1) & (size.sum(3)[..., 1] > 1e-20)
    norms = expected.sum(3)
    torch.testing.assert_close(norms[..., 2][kept], norms[..., 1][kept], rtol=1e-4, atol=0)


@settings(max_examples=100)
@given(cache=caches())
def test_cosines_are_means_over_layers_as_far_as_float32_can_tell(cache):
    plain, pages, own, other = cache
    for vectors, found in zip(
        plain.vectors(torch.arange(PAGES)), pair_cosines(pair_sums(pages, own, other)), strict=True
    ):
        norm = torch.linalg.vector_norm(vectors.double(), dim=-1)
        unit = vectors.double() / norm.clamp(min=1e-300)[..., None]
        expected = (unit[:, own] * unit[:, other]).sum(-1).mean(0)
        norms = torch.stack((norm[:, own], norm[:, other]))
        ratio = torch.where((norms == 0).any(0), 1.0, norms.amax(0) / norms.amin(0)).amax(0)
        usable = ((norms == 0) | (norms > 1e-13)).all(0).all(0) & (ratio < 1e3)
        assert ((found - expected).abs() <= 1e-6 * ratio)[usable].all()
        assert not (found.abs() > 1.01).any()


def test_blocks_too_unlike_in_norm_have_no_cosine():
    layer = torch.tensor([1e-3, 1.0, 1e5])[:, None].expand(3, 64)
    slots = row_major(2, 16, 16)
    pages = PackedPages([layer.contiguous()], slots % 2, slots >= 2)
    for found in pair_cosines(pair_sums(pages, torch.tensor([0, 0, 2]), torch.tensor([1, 2, 2]))):
        assert torch.allclose(found, torch.tensor([1.0, 0.0, 1.0]), atol=1e-3)


@pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=str)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("place", [0, 100, 4095])
def test_what_is_no_number_is_never_accepted(dtype, number, reference, place):
    layer = torch.ones(3, 4096).to(dtype)
    if dtype == torch.float8_e4m3fn:  # it has no infinity
        number = torch.nan
    layer[1, place] = number
    slots = vnni(2, 64)
    pages = PackedPages([torch.ones_like(layer), layer], slots % 16, slots >= 16)
    own, other = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 1, 2])
    sums = (pair_sums_reference if reference else pair_sums)(pages, own, other)
    for aggregate in ("rms", "max"):
        assert RESIDENT.rule().allows(pair_errors(sums, aggregate), NOT_ASKED).tolist() == [False, False, False, True]


def test_zero_and_tiny_blocks_are_only_equal_or_not():
    layer = torch.zeros(4, 12)
    layer[1] = 1e-25
    layer[2] = -1e-25
    layer[3, ::2] = -0.0
    pages = PackedPages([layer], torch.arange(12) % 2, torch.arange(12) >= 6)
    own, other = torch.tensor([0, 1, 1, 0, 0]), torch.tensor([0, 2, 1, 1, 3])
    for compare in (pair_sums, pair_sums_reference):
        for errors in pair_errors(compare(pages, own, other), "rms"):
            assert errors.tolist() == [0.0, torch.inf, 0.0, torch.inf, 0.0]


@pytest.mark.parametrize(
    ("own", "other", "error"),
    [
        ([0, 3], [0, 1], IndexError),
        ([0, 1], [0, 3], IndexError),
        ([-1, 0], [0, 1], IndexError),
        ([0, 1], [0], LayoutError),
        ([[0]], [[0]], LayoutError),
        ([0.5], [0.5], LayoutError),
        ([True], [True], LayoutError),
    ],
)
def test_wrong_page_numbers_are_refused(own, other, error):
    slots = row_major(2, 3, 3)
    pages = PackedPages([torch.ones(3, 12)], slots % 2, slots >= 2)
    with pytest.raises(error):
        pair_sums(pages, torch.tensor(own), torch.tensor(other))


def test_no_pairs_and_strided_numbers_of_pages():
    slots = row_major(2, 3, 3)
    pages = PackedPages([torch.arange(36.0).view(3, 12)], slots % 2, slots >= 2)
    none = torch.zeros(0, dtype=torch.long)
    assert pair_sums(pages, none, none).shape == pair_sums_reference(pages, none, none).shape == (0, 1, 2, 2, 3)
    index = torch.tensor([[2, 0], [1, 2], [0, 1]], dtype=torch.int32)
    assert torch.equal(pair_sums(pages, *index.T), pair_sums(pages, *index.T.contiguous().long()))


def small_cache():
    generator = torch.Generator().manual_seed(0)
    slots = vnni(1, 32)
    pages = PackedPages([torch.randn(3, len(slots), generator=generator).bfloat16()], slots % 16, slots >= 16)
    return pages, torch.tensor([0, 1]), torch.tensor([1, 2])


def test_without_a_compiler_it_is_slower_and_says_so_once(fresh, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(pair_sums(*small_cache()), pair_sums_reference(*small_cache()))
    assert [str(warning.message).count("install gcc") for warning in said] == [1]
