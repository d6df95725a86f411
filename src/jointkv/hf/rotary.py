"""How each layer of a model turns keys with their position: what the model says of itself, checked by running it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from jointkv.attention.rotary import NOT_TURNED, Rotary, far, that_turns
from jointkv.core.bookkeeping import bookkeeping
from jointkv.errors import UnsupportedModel
from jointkv.hf.modes import evaluating

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose angles depend on how long the text is."""

SHIFTS = (1, 7, 100, 1000)
PROBES = 16
"""Tokens that are computed alone, at two positions each."""


@bookkeeping
def rotary_of(model: PreTrainedModel, layers: Sequence[int]) -> list[Rotary]:
    """How each of `layers` turns its keys.

    Tokens alone attend to nothing but themselves, so between two positions their K may differ by the turning, and V
    not at all. What the model's rotary modules say is taken only where that holds.

    Raises:
        UnsupportedModel: the angles depend on the length of the text, or K of a layer depends on the position in
            another way (learnt positions, ALiBi).
    """
    kinds = {str(kind) for module in model.modules() for kind in _kinds(module)}
    for kind in sorted(kinds & set(LENGTH_DEPENDENT)):
        raise UnsupportedModel(f"text that moved: {kind} rotary embeddings turn keys by the length of the text as well")
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or max(SHIFTS) + 1
    shifts = torch.tensor([min(shift, context - 1) for shift in SHIFTS]).repeat(PROBES // len(SHIFTS))
    generator = torch.Generator().manual_seed(0)  # the user's random numbers stay as they are
    tokens = torch.randint(0, model.get_input_embeddings().num_embeddings, (PROBES, 1), generator=generator)
    with evaluating(model):
        before, after = (_alone(model, tokens, positions) for positions in (torch.zeros_like(shifts), shifts))
    candidates = _candidates(model)
    return [_that_turns(before.layers[i], after.layers[i], shifts, candidates, i) for i in layers]


def _kinds(module: torch.nn.Module) -> list[object]:
    kind = getattr(module, "rope_type", None)
    return list(kind.values()) if isinstance(kind, dict) else [kind]


def _candidates(model: PreTrainedModel) -> list[Rotary]:
    """What the model's buffers offer, each once, and turning nothing at all."""
    found = [NOT_TURNED]
    seen: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or "original" in name:
            continue
        frequencies = buffer.detach().double().cpu().flatten()
        if not any(torch.equal(frequencies, other) for other in seen):
            seen.append(frequencies)
            found += [Rotary(frequencies, interleaved) for interleaved in (False, True)]
    return found


def _alone(model: PreTrainedModel, tokens: Tensor, positions: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    inputs = tokens.to(model.device), positions[:, None].to(model.device)
    model(input_ids=inputs[0], position_ids=inputs[1], past_key_values=cache, use_cache=True)
    return cache


def _that_turns(before: object, after: object, shifts: Tensor, candidates: Sequence[Rotary], layer: int) -> Rotary:
    values = before.values, after.values  # type: ignore[attr-defined]
    keys = before.keys, after.keys  # type: ignore[attr-defined]
    same = far(*values) <= 10 * torch.finfo(values[0].dtype).eps
    found = that_turns(*keys, shifts, candidates) if same else None
    if found is None:
        raise UnsupportedModel(
            f"text that moved: K of layer {layer} is not turned with its position as rotary embeddings do"
        )
    return found
