"""Which K and V a model may hand over, what pages they fit, and where they may stand."""

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


def check_place(past: int, new: int, attention_mask: object, position_ids: Tensor | None) -> None:
    """Raises LayoutError for new tokens that are not said to stand behind the `past` ones.

    Of a mask that is too short transformers hides the last tokens, and what it generates with an assistant or by prompt
    lookup begins with the whole prompt, whatever the cache holds.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and attention_mask.shape[1] != past + new:
        raise LayoutError(
            f"an attention_mask of {attention_mask.shape[1]} columns: it must cover both the {past} tokens in the "
            f"cache and the {new} new ones"
        )
    if past and attention_mask is None and new > 1 and position_ids is not None and not position_ids[..., 0].any():
        raise LayoutError(
            f"new tokens from position 0 on, behind {past} tokens in the cache: assisted generation and prompt lookup "
            "read the whole prompt, and need an empty cache"
        )
