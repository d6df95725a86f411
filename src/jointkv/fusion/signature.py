"""Cheap fingerprints of blocks: random projections for near-duplicates, token hashes for equal text."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from jointkv.core.blocks import KVPages, checked_pages
from jointkv.errors import LayoutError
from jointkv.fusion.kernels import SignatureKernel, kernels_for

LEAST_PROJECTIONS, PROJECTIONS_OF_A_GROUP = 4, 64
"""Random projections per layer and side: 64 shared out over the layers of a group, 4 at the least. The squared distance
of two signatures of `s` numbers has a relative standard deviation of about `sqrt(2 / s)` (Johnson and Lindenstrauss):
13% for one layer, 9% for thirty."""


class BlockSignature:
    """Projects each layer's unit K and unit V blocks onto a few random directions.

    The squared distance of two signatures estimates the mean over layers and over K and V of `|u - w|^2` between
    unit vectors, which is at most about the larger of the two squared relative errors.

    Args:
        kv: decides the sizes of K and V blocks; later calls may pass other pages with blocks of these sizes.
        seed: of the projections; the same seed and order of elements give the same signatures in every process.
        size: numbers of a signature; None: as many as there are projections.
        similarity: `"key"`: the mean is over layers and K alone.
    """

    def __init__(
        self,
        kv: KVPages,
        seed: int = 0,
        *,
        size: int | None = None,
        similarity: Literal["key", "key_value"] = "key_value",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = max(LEAST_PROJECTIONS, PROJECTIONS_OF_A_GROUP // kv.num_layers)
        taken = 2 * count * kv.num_layers
        self._projections = [
            torch.randn(numbers, count, generator=generator).to(kv.device) * taken**-0.5 for numbers in _sizes(kv)
        ]
        self.size = taken if size is None else size
        self._mixed = None
        if size is not None or similarity == "key":
            self._mixed = _mixture(taken, self.size, similarity == "key", generator).to(kv.device)
        self._kept: tuple[tuple[object, ...], list[Tensor | None], SignatureKernel | None] | None = None

    def __call__(self, kv: KVPages, pages: Tensor) -> Tensor:
        """Signatures of the blocks `pages [n]`: float32 `[n, size]` on the pages' device.

        A block with NaN or infinity gets a signature that is not finite. By a kernel that reads each page once where
        one can be had.

        Raises:
            IndexError: a page number is out of range.
            LayoutError: `pages` is not a vector of integers, or the blocks have another size.
        """
        index = checked_pages(kv, pages)
        sizes = _sizes(kv)
        known = [len(projection) for projection in self._projections]
        if sizes != known:
            raise LayoutError(f"blocks of {sizes} numbers, and projections of {known}")
        kernel = self._kernel(kv) if len(index) else None
        return self.reference(kv, index) if kernel is None else self._mix(kernel(kv, index))

    def reference(self, kv: KVPages, pages: Tensor) -> Tensor:
        """What a call returns, in plain torch."""
        parts = [self._mix(self._signatures(kv, pages[part])) for part in kv.batches(len(pages))]
        return torch.cat(parts) if parts else torch.zeros(0, self.size, device=kv.device)

    def _signatures(self, kv: KVPages, pages: Tensor) -> Tensor:
        columns = []
        for blocks, projection in zip(kv.vectors(pages), self._projections, strict=True):
            norm = torch.linalg.vector_norm(blocks, dim=-1, keepdim=True)
            projected = blocks @ projection
            columns.append(torch.where(norm == 0, torch.zeros_like(projected), projected / norm))
        return torch.stack(columns).permute(2, 0, 1, 3).flatten(1)

    def _mix(self, signatures: Tensor) -> Tensor:
        return signatures if self._mixed is None else signatures @ self._mixed

    def _kernel(self, kv: KVPages) -> SignatureKernel | None:
        """That for pages like those of `kv`, kept for the next call."""
        for layers, _ in kv.sides:
            stride = layers[0].stride(0)
            if not all(x[0].is_contiguous() and x.stride(0) == stride and x.device == kv.device for x in layers):
                return None
        orders = [side.order for side in kv.sides]
        kind = (kv.dtype, kv.device, *map(id, orders))
        if self._kept is None or self._kept[0] != kind:
            kernels = kernels_for(kv.device.type)
            # With the orders themselves: the id of one that is gone may be another's.
            self._kept = (kind, orders, kernels.signatures(kv, self._projections) if kernels else None)
        return self._kept[2]


def _mixture(taken: int, size: int, keys_alone: bool, generator: torch.Generator) -> Tensor:
    """What makes a signature `[size]` of `taken` products, with a square that is theirs on average: `[taken, size]`."""
    used = taken // 2 if keys_alone else taken
    axes, _ = torch.linalg.qr(torch.randn(used, min(used, size), generator=generator))
    mixture = torch.zeros(taken, size)
    mixture[:used, : axes.shape[1]] = axes * (taken / axes.shape[1]) ** 0.5
    return mixture


def _sizes(kv: KVPages) -> list[int]:
    """Numbers of a K block and of a V block, in one layer."""
    return [layers[0][0].numel() if order is None else len(order) for layers, order in kv.sides]


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
