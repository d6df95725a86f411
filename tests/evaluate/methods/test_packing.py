"""Quantisation and packing of bits."""

import pytest
import torch

from jointkv.errors import BadInput
from jointkv.evaluate.methods.packing import BITS, pack


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [1, 3])
def test_numbers_come_back_within_half_a_step(bits, dim):
    torch.manual_seed(0)
    numbers = torch.randn(5, 4, 3, 8) * 10 ** torch.randn(5, 1, 1, 1)
    packed = pack(numbers, dim, bits)
    span = numbers.amax(dim, keepdim=True) - numbers.amin(dim, keepdim=True)
    allowed = span / (2**bits - 1) / 2 + numbers.abs().amax(dim, keepdim=True) * 2e-3  # float16 offset and step
    assert ((packed.read() - numbers).abs() <= allowed).all()


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_bits_and_two_float16_per_group(bits):
    packed = pack(torch.randn(5, 4, 3, 8), 1, bits)
    assert packed.nbytes == 5 * 4 * 3 * 8 * bits // 8 + 5 * 3 * 8 * 2 * 2
    assert packed.codes.numel() == 5 * 4 * 3 * 8 * bits // 8


@pytest.mark.parametrize("bits", BITS)
def test_codes_use_all_levels_and_are_read_back_in_order(bits):
    numbers = torch.arange(2**bits).float().repeat(3)[None]
    assert torch.equal(pack(numbers, 1, bits).read(), numbers)


def test_a_number_of_codes_that_fills_no_whole_byte():
    numbers = torch.tensor([[0.0, 3.0, 1.0]])
    packed = pack(numbers, 1, 2)
    assert packed.codes.numel() == 1 and torch.equal(packed.read(), numbers)


def test_selected_entries_are_those_of_the_whole():
    packed = pack(torch.randn(6, 4, 2, 8), 3, 4)
    index = torch.tensor([4, 0, 4])
    assert torch.equal(packed.select(index).read(), packed.read()[index])


def test_equal_numbers_stay_equal():
    numbers = torch.full((2, 4, 1, 2), 0.5)
    assert torch.equal(pack(numbers, 1, 2).read(), numbers)


def test_other_bits_are_refused():
    with pytest.raises(BadInput, match="3 bits; known: 8, 4, 2"):
        pack(torch.zeros(1, 1), 0, 3)


def test_no_entries_can_be_selected_from_none():
    packed = pack(torch.zeros(0, 4, 2, 8), 1, 4)
    none = packed.select(torch.zeros(0, dtype=torch.long))
    assert none.read().shape == (0, 4, 2, 8) and none.nbytes == 0
