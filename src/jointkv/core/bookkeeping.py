"""Keeping long-lived tensors usable whatever autograd mode the caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def bookkeeping(method: Callable[P, R]) -> Callable[P, R]:
    """Run `method` outside inference mode and without gradients.

    A tensor made in `torch.inference_mode()` cannot be changed in place outside of it, but a pool outlives the
    forward pass that made it; and nothing that the cache holds may keep an autograd graph alive.
    """

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return wrapped
