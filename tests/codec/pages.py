"""Random pages of a tiny model: keys turned with their position, over a mean, alike in few directions."""

from __future__ import annotations

import torch
from torch import Tensor

from jointkv.attention.rotary import Rotary
from jointkv.codec import Pages, Transform
from jointkv.codec.turning import turn_pages

LAYERS, TOKENS, HEADS, SIZE = 3, 8, 2, 16
ROTARY = [Rotary(10_000.0 ** -(torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE), False)] * LAYERS


def random_pages(count: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, first: int = 0) -> Pages:
    """`count` pages of one text whose first block begins at token `first`."""
    draw = torch.Generator().manual_seed(seed)
    positions = first + TOKENS * torch.arange(count)
    shape = (LAYERS, count, TOKENS, HEADS, SIZE)
    spread = torch.linspace(2, 0.1, SIZE)
    keys, values = (torch.randn(shape, generator=draw) * spread + torch.linspace(-1, 1, SIZE) for _ in range(2))
    flat = keys.flatten(1, 2)[:, :, None]
    shift = (positions[:, None] + torch.arange(TOKENS)).flatten()
    turned = turn_pages(flat, shift, ROTARY).view(shape)
    return Pages(turned.to(dtype), values.to(dtype), positions)


def fitted() -> Transform:
    """The transform of that model."""
    return Transform.fit(random_pages(60, seed=9), ROTARY)


def near(pages: Pages, error: float, seed: int = 1) -> Pages:
    """`pages` with so much noise, as a share of their own numbers' deviation."""
    draw = torch.Generator().manual_seed(seed)

    def noisy(side: Tensor) -> Tensor:
        noise = torch.randn(side.shape, generator=draw) * side.float().std() * error
        return (side.float() + noise).to(side.dtype)

    return Pages(noisy(pages.keys), noisy(pages.values), pages.positions)
