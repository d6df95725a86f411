"""The Triton kernels that compare pages and take signatures are the plain definitions, on a GPU or in the interpreter.

That the compiler takes them too is seen in attention/test_triton_kernel.py.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings

from jointkv.core.blocks import PagedKV
from jointkv.core.packed import BITS, PACKED_DTYPES, PackedPages
from jointkv.errors import LayoutError
from jointkv.fusion import pair_sums as module
from jointkv.fusion.kernels import kernels_for
from jointkv.fusion.pair_sums import pair_errors, pair_sums_reference
from jointkv.fusion.signature import BlockSignature
from jointkv.policy.rule import NOT_ASKED
from tests.fusion.kernels.test_signatures import contiguous_pages, packed_pages
from tests.fusion.strategies import RESIDENT
from tests.fusion.test_pair_sums import caches

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from jointkv.fusion.kernels import gpu

# numpy, which the interpreter computes with, tells of NaN and infinity.
pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [(3, 1, 5, 3), (2, 1, 65, 64)]


def there(kv):
    if isinstance(kv, PackedPages):
        return replace(kv, layers=[layer.to(DEVICE) for layer in kv.layers])
    return PagedKV(*([layer.to(DEVICE) for layer in side] for side in (kv.keys, kv.values)))


def compare(pages, own, other, rounding):
    found, expected = gpu.Kernels().pair_sums(there(pages), own, other), pair_sums_reference(pages, own, other)
    assert found.shape == expected.shape and found.device.type == DEVICE
    found = found.cpu()
    torch.testing.assert_close(found, expected, rtol=rounding, atol=1e-37 if rounding > 1e-6 else 0, equal_nan=True)
    assert torch.equal(found[..., 0] > 0, expected[..., 0] > 0), "alike only where it was"
    return found


@settings(max_examples=6)
@given(cache=caches())
def test_sums_are_the_reference(cache):
    _, pages, own, other = cache
    compare(pages, own, other, 1e-5)


@pytest.mark.parametrize("dtype", PACKED_DTYPES[1:], ids=str)
def test_every_number_of_a_type_is_read_right(dtype):
    codes = torch.arange(2 ** (8 * dtype.itemsize)).to(BITS[dtype.itemsize])
    tokens, half = 64, len(codes) // 2
    layer = torch.stack((codes, torch.zeros_like(codes), codes.flip(0))).view(dtype)
    pages = PackedPages([layer], torch.arange(len(codes)) % tokens, torch.arange(len(codes)) >= half)
    compare(pages, torch.tensor([0, 0]), torch.tensor([1, 2]), 1e-6)
    # A token of the first numbers alone: what the sums over many, which are mostly not finite, do not show.
    few = PackedPages([layer[:, :128].contiguous()], torch.arange(128) % tokens, torch.arange(128) >= tokens)
    compare(few, torch.tensor([0, 0]), torch.tensor([1, 2]), 1e-6)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_no_number_is_never_accepted(number):
    layer = torch.ones(3, 96)
    layer[1, 50] = number
    pages = PackedPages([torch.ones_like(layer), layer], torch.arange(96) % 3, torch.arange(96) >= 48)
    sums = compare(pages, torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 1, 2]), 1e-5)
    assert RESIDENT.rule().allows(pair_errors(sums, "rms"), NOT_ASKED).tolist() == [False, False, False, True]


def test_zero_and_tiny_blocks_are_only_equal_or_not():
    layer = torch.zeros(4, 12)
    layer[1], layer[2], layer[3, ::2] = 1e-25, -1e-25, -0.0
    pages = PackedPages([layer], torch.arange(12) % 2, torch.arange(12) >= 6)
    sums = compare(pages, torch.tensor([0, 1, 1, 0, 0]), torch.tensor([0, 2, 1, 1, 3]), 1e-6)
    for errors in pair_errors(sums, "rms"):
        assert errors.tolist() == [0.0, torch.inf, 0.0, torch.inf, 0.0]


def test_no_pairs():
    pages = there(PackedPages([torch.ones(2, 12)], torch.arange(12) % 2, torch.arange(12) >= 6))
    assert gpu.Kernels().pair_sums(pages, *torch.zeros(2, 0, dtype=torch.long)).shape == (0, 1, 2, 2, 3)


def taken(signature, kv, pages):
    kv = there(kv)
    return gpu.Kernels().signatures(kv, signature._projections)(kv, pages)


@settings(max_examples=6)
@given(case=contiguous_pages(most_layers=3, most_pages=9, shapes=SMALL))
def test_signatures_are_the_definition(case):
    kv, pages = case
    signature = BlockSignature(there(kv))
    found = taken(signature, kv, pages)
    torch.testing.assert_close(found, signature.reference(there(kv), pages), rtol=0, atol=2e-6)


@settings(max_examples=4)
@given(case=packed_pages(shapes=[(3, 5, 3), (2, 65, 64)]))
def test_signatures_of_pages_in_an_order_of_their_own(case):
    pages, asked = case
    signature = BlockSignature(there(pages))
    found = taken(signature, pages, asked)
    torch.testing.assert_close(found, signature.reference(there(pages), asked), rtol=0, atol=2e-6)


def test_signatures_of_zero_blocks_and_of_what_is_no_number():
    kv = PagedKV(*([torch.randn(11, 2, 1, 70) for _ in range(16)] for _ in range(2)))
    kv.values[3][1, 1, 0, 69], kv.keys[0][2, 0, 0, 0], kv.keys[15][10, 1, 0, 3] = torch.nan, torch.inf, -torch.inf
    for layer in (*kv.keys, *kv.values):
        layer[4] = 0
    signature, pages = BlockSignature(there(kv)), torch.arange(11)
    found, expected = taken(signature, kv, pages), signature.reference(there(kv), pages)
    assert (~found.isfinite().all(1)).nonzero()[:, 0].tolist() == [1, 2, 10] and not found[4].any()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("installed", [True, False])
def test_pages_on_a_gpu_are_for_triton_where_there_is_triton(monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "jointkv.fusion.kernels.gpu")
    kernels_for.cache_clear()
    found = kernels_for("cuda")
    kernels_for.cache_clear()
    assert isinstance(found, gpu.Kernels) if installed else found is None


def test_other_devices_have_no_kernels():
    assert kernels_for("meta") is None


def test_sums_are_on_their_way_before_they_are_asked_for():
    """On a GPU nothing waits for it; pages that are written after the start are not what is compared."""
    pages = there(PackedPages([torch.arange(36.0).view(3, 12)], torch.arange(12) % 2, torch.arange(12) >= 6))
    own, other = torch.tensor([0, 1]), torch.tensor([1, 2])
    expected = pair_sums_reference(pages, own, other)
    take = module.start_pair_sums(pages, own, other)
    pages.layers[0].zero_()
    found = take()
    assert found.device.type == "cpu" and (DEVICE == "cpu" or found.is_pinned())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernels", [SimpleNamespace(pair_sums=lambda *_: torch.ones(2)), None])
def test_the_kernel_compares_where_there_is_one(monkeypatch, kernels):
    monkeypatch.setattr(module, "kernels_for", lambda device: kernels)
    monkeypatch.setattr(module, "pair_sums_reference", lambda *_: torch.zeros(2))
    pages = PackedPages([torch.ones(2, 12)], torch.arange(12) % 2, torch.arange(12) >= 6)
    none = torch.zeros(0, dtype=torch.long)
    assert module.pair_sums(pages, none, none).tolist() == ([1, 1] if kernels else [0, 0])
    with pytest.raises(LayoutError):
        module.pair_sums(pages, none, torch.zeros(1, dtype=torch.long))
