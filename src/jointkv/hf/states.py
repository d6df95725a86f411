"""Which K and V a model may hand over, and what pages they fit."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from jointkv.core.blocks import SUPPORTED_DTYPES
from jointkv.errors import LayoutError

_OTHER_DTYPE = "load the model in float32, bfloat16 or float16, and make a new JointPool after its dtype was changed"


def widest_dtype(model_dtype: torch.dtype, key_states: Tensor, value_states: Tensor) -> torch.dtype:
    """The dtype of pages that hold K and V, and those that a model of `model_dtype` computes, without loss.

    Raises:
        LayoutError: K or V have a dtype that pages cannot have.
    """
    given = [states.dtype for states in (key_states, value_states)]
    for dtype in given:
        if dtype not in SUPPORTED_DTYPES:
            raise LayoutError(f"K or V of {dtype} are not supported: {_OTHER_DTYPE}")
    wanted = [*given, model_dtype] if model_dtype in SUPPORTED_DTYPES else given
    return functools.reduce(torch.promote_types, wanted)


def check_states(keys: Tensor, values: Tensor, key_states: Tensor, value_states: Tensor) -> None:
    """Raises LayoutError unless states `[rows, h, n, d]` fit pages `[pages, t, h, d]` without loss, on their device."""
    for states, pages in ((key_states, keys), (value_states, values)):
        shape = [states.shape[1], states.shape[3]]
        if shape != list(pages.shape[2:]):
            raise LayoutError(f"K or V {shape} do not fit pages of {list(pages.shape[2:])}: a pool serves one model")
        if torch.promote_types(states.dtype, pages.dtype) != pages.dtype:
            raise LayoutError(f"K or V of {states.dtype} do not fit pages of {pages.dtype}: {_OTHER_DTYPE}")
        if states.device != pages.device:
            raise LayoutError(
                f"K or V on {states.device} do not fit pages on {pages.device}: all layers that have pages must be on "
                "one device; make a new JointPool after a model was moved"
            )
