"""Gradients through what attention reads: they reach the states of the forward pass itself, and pages keep none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jointkv.errors import GradientLost


def attach_gradients(whole: Tensor, states: Tensor, lost: Tensor | None) -> Tensor:
    """`whole`, with gradients to the `states` of its last tokens.

    Args:
        whole: what pages hold, `[rows, h, length, d]`.
        states: as the model computed them, `[rows, h, n, d]`.
        lost: a `refusal`, if earlier tokens had gradients, which pages have not kept.
    """
    past = whole[:, :, : whole.shape[2] - states.shape[2]]
    return torch.cat((past if lost is None else past * lost, states), 2)


def refusal() -> Tensor:
    """A factor of 1: `backward` raises `GradientLost` where it would leave out what was multiplied with it."""
    with torch.enable_grad():
        one: Tensor = _Refusing.apply(torch.ones((), requires_grad=True))  # type: ignore[no-untyped-call]
    return one


class _Refusing(torch.autograd.Function):
    """Hands its input on, and refuses a gradient."""

    @staticmethod
    def forward(ctx: Any, one: Tensor) -> Tensor:
        return one.view_as(one)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise GradientLost(
            "the loss depends on tokens that an earlier forward pass computed with gradients, and pages keep none: "
            "compute them under torch.no_grad() if they need none, in one forward pass with the rest if they do, or "
            "use a DynamicCache"
        )
