"""Keeping long-lived tensors usable, and numbers exact, whatever mode of torch the caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


def bookkeeping(method: Callable[P, R]) -> Callable[P, R]:
    """Run `method` outside inference mode and autocast, and without gradients.

    A tensor made in `torch.inference_mode()` cannot be changed in place outside of it, but a pool outlives the
    forward pass that made it; nothing that the cache holds may keep an autograd graph alive; and errors that are
    compared with bounds are not to be rounded by `torch.autocast`. What a compiled model calls is kept out of its
    graphs where it calls it: torch's compiler takes a second to import.
    """

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        autocast = [device for device in AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
        if not (autocast or torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
            return method(*args, **kwargs)  # as in most calls: what calls it is wrapped as well
        with torch.inference_mode(False), torch.no_grad(), _without(autocast) if autocast else nullcontext():
            return method(*args, **kwargs)

    return wrapped


Autocast = tuple[tuple[str, torch.dtype], ...]
"""Devices with autocast on, and to which dtype."""


def autocast_here() -> Autocast:
    """The autocast that is on now, to be `under` inside bookkeeping for what is computed as the caller has it."""
    return tuple(
        (device, torch.get_autocast_dtype(device)) for device in AUTOCAST_DEVICES if torch.is_autocast_enabled(device)
    )


@contextmanager
def under(autocast: Autocast) -> Iterator[None]:
    """Have `autocast` on."""
    with ExitStack() as stack:
        for device, dtype in autocast:
            # Weights that were cast without gradients must not be found by the caller's own forward pass.
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
        yield


@contextmanager
def _without(autocast: list[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for device in autocast:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
