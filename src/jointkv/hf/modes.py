"""In which mode a model is: in training mode its dropout makes other numbers of the same tokens each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def in_training(model: nn.Module) -> str | None:
    """A part of the model that is in training mode, if there is one."""
    return next((name or type(part).__name__ for name, part in model.named_modules() if part.training), None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have `model` compute in evaluation mode; each part is in its own mode again afterwards."""
    before = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
