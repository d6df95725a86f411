"""Gradients through what attention reads: they reach the states of the forward pass itself, and pages keep none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jointkv.errors import GradientLost


def attach_gradients(whole: Tensor, states: Tensor, lost: bool) -> Tensor:
    """`whole`, with gradients to the `states` of its last tokens.

    Args:
        whole: what pages hold, `[rows, h, length, d]`.
        states: as the model computed them, `[rows, h, n, d]`.
        lost: whether earlier tokens had gradients, which pages have not kept: `backward` then raises `GradientLost`
            instead of leaving them out.
    """
    past = whole[:, :, : whole.shape[2] - states.shape[2]]
    if lost:
        past = _Refusing.apply(past, torch.ones((), requires_grad=True))  # type: ignore[no-untyped-call]
    return torch.cat((past, states), 2)


class _Refusing(torch.autograd.Function):
    """Hands its input on, and refuses a gradient; the second input is there so that one is asked for."""

    @staticmethod
    def forward(ctx: Any, past: Tensor, _asks: Tensor) -> Tensor:
        return past.view_as(past)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise GradientLost(
            "the loss depends on tokens that an earlier forward pass computed with gradients, and pages keep none: "
            "compute them under torch.no_grad() if they need none, in one forward pass with the rest if they do, or "
            "use a DynamicCache"
        )
