"""Cheap fingerprints of blocks: random projections for near-duplicates, token hashes for equal text."""

from __future__ import annotations

import torch
from torch import Tensor

from jointkv.blocks import PagedKV

PROJECTIONS = 8
"""Random projections per layer and side. With `L` layers the squared distance of two signatures has a relative
standard deviation of about `sqrt(2 / (8 L))` (Johnson and Lindenstrauss): 9% for 30 layers."""


class BlockSignature:
    """Projects each layer's unit K and unit V blocks onto a few random directions.

    The squared distance of two signatures estimates the mean over layers and over K and V of `|u - w|^2` between
    unit vectors, which is at most about the larger of the two squared relative errors.

    Args:
        kv: decides the sizes of K and V blocks; later calls may pass other pages of the same layout.
        seed: of the projections; the same seed gives the same signatures in every process.
    """

    def __init__(self, kv: PagedKV, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = (kv.keys[0][0].numel(), kv.values[0][0].numel())
        scale = (2 * kv.num_layers * PROJECTIONS) ** -0.5
        self._projections = [
            torch.randn(size, PROJECTIONS, generator=generator).to(kv.device) * scale for size in sizes
        ]
        self.size = 2 * PROJECTIONS * kv.num_layers

    def __call__(self, kv: PagedKV, pages: Tensor, *, batch: int = 256) -> Tensor:
        """Signatures of the blocks `pages [n]`: float32 `[n, size]` on the pages' device.

        A block with NaN or infinity gets a signature that is not finite.
        """
        parts = [self._signatures(kv, pages[start : start + batch]) for start in range(0, len(pages), batch)]
        return torch.cat(parts) if parts else torch.zeros(0, self.size, device=kv.device)

    def _signatures(self, kv: PagedKV, pages: Tensor) -> Tensor:
        columns = []
        for blocks in kv.vectors(pages):
            for side in (0, 1):
                norm = torch.linalg.vector_norm(blocks[side], dim=-1, keepdim=True)
                projected = blocks[side] @ self._projections[side]
                columns.append(torch.where(norm == 0, torch.zeros_like(projected), projected / norm))
        return torch.cat(columns, -1)


def token_hashes(tokens: Tensor, block_size: int) -> Tensor:
    """64-bit hashes of the token ids of each block.

    Args:
        tokens: `[..., blocks * block_size]` long.

    Returns:
        `[..., blocks]` long. Equal tokens give equal hashes; unequal ones differ but for about 2^-64.
    """
    generator = torch.Generator().manual_seed(block_size)
    factors = torch.randint(-(2**62), 2**62, (2, block_size), generator=generator) * 2 + 1
    blocks = tokens.unflatten(-1, (-1, block_size)).long() + 1
    first = (blocks * factors[0].to(tokens.device)).sum(-1)
    mixed = first ^ (first >> 29)
    return mixed * 0x2545F4914F6CDD1D + ((blocks ^ (blocks << 21)) * factors[1].to(tokens.device)).sum(-1)
