"""Asymmetric integer quantisation of tensors, bits packed into bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.errors import BadInput

BITS = (8, 4, 2)


@dataclass(frozen=True)
class Packed:
    """A tensor as `bits`-bit codes with one scale and one offset per group, both float16.

    Attributes:
        codes: uint8 `[ceil(numel * bits / 8)]`, the first number in the lowest bits.
        scale, low: the step and the smallest number of each group; broadcast against `shape`.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.low.nbytes

    def select(self, index: Tensor) -> Packed:
        """The entries `index` of the first dimension, whose numbers must fill whole bytes."""
        width = self.shape[1:].numel() * self.bits // 8  # given, because no entries at all leave it open
        codes = self.codes.view(self.shape[0], width)[index]
        shape = torch.Size((len(index), *self.shape[1:]))
        return Packed(codes.flatten(), self.scale[index], self.low[index], self.bits, shape)

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers again, each within half a step of what was packed (and float16's rounding of the step)."""
        shifts = torch.arange(0, 8, self.bits, device=self.codes.device)
        numbers = (self.codes[:, None] >> shifts & 2**self.bits - 1).flatten()[: self.shape.numel()]
        return (numbers.view(self.shape) * self.scale.float() + self.low.float()).to(dtype)


def pack(tensor: Tensor, dim: int, bits: int) -> Packed:
    """Quantise `tensor`; numbers along `dim` share a scale and an offset.

    Raises `BadInput` unless `bits` is 8, 4 or 2.
    """
    if bits not in BITS:
        raise BadInput(f"{bits!r} bits; known: {', '.join(map(str, BITS))}")
    numbers = tensor.float()
    low = numbers.amin(dim, keepdim=True).half()
    # The step is rounded to float16 before it is used, so that codes and reading agree on it.
    step = (numbers.amax(dim, keepdim=True) - low.float()) / (2**bits - 1)
    scale = step.clamp(min=torch.finfo(torch.float16).tiny).half()
    codes = ((numbers - low.float()) / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8).flatten()
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % per_byte)).view(-1, per_byte)
    shifted = codes << torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return Packed(shifted.sum(1, dtype=torch.uint8), scale, low, bits, tensor.shape)
