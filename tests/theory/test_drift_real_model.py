"""Bounds hold on the real model's queries, keys and values when one request's blocks are read from another's pages."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from jointkv.evaluate.traffic import get_traffic
from jointkv.hf.models import load_model
from jointkv.theory.drift import AttentionDrift, attention_drift

LAYERS = (1, 9, 18, 29)
BLOCK, BOUND = 16, 0.2
PROMPT, QUERIES = 400, 24
"""Tokens of the prompt, and how many of the last ones' attention rows are compared."""


def attention_inputs(model: nn.Module, row: tuple[int, ...]) -> dict[int, tuple[Tensor, Tensor, Tensor, float]]:
    """Per layer of `LAYERS` the q, k, v given to attention, `[heads, n, d]`, and the scale."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}

    def record(module, query, key, value, mask, scaling=None, **arguments):
        if module.layer_idx in LAYERS:
            seen[module.layer_idx] = (query[0], key[0], value[0], scaling)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **arguments)

    AttentionInterface.register("recorded", record)
    AttentionMaskInterface.register("recorded", sdpa_mask)
    model.set_attn_implementation("recorded")
    with torch.inference_mode():
        model(input_ids=torch.tensor([row]), use_cache=False, logits_to_keep=1)
    return seen


def read_from(own: Tensor, other: Tensor, bound: float) -> tuple[Tensor, float]:
    """Blocks of `own [h, n, d]` replaced by those of `other` where the relative error allows; share replaced."""
    heads, tokens, size = own.shape
    full = min(tokens, other.shape[1]) // BLOCK * BLOCK
    blocks, partners = (states[:, :full].view(heads, -1, BLOCK, size) for states in (own, other))
    error = (blocks - partners).square().sum((0, 2, 3)) / blocks.square().sum((0, 2, 3))
    served = error.sqrt() <= bound
    read = own.clone()
    read[:, :full] = torch.where(served[:, None, None], partners, blocks).reshape(heads, full, size)
    return read, float(served.double().mean())


def drift_of_layer(own, other) -> tuple[AttentionDrift, float]:
    query, key, value, scale = own
    key_read, served = read_from(key, other[1], BOUND)
    value_read, _ = read_from(value, other[2], BOUND)
    groups = query.shape[0] // key.shape[0]
    wide = [states.repeat_interleave(groups, 0)[:, None] for states in (key, key_read, value, value_read)]
    tokens = key.shape[1]
    mask = torch.arange(tokens) <= torch.arange(tokens - QUERIES, tokens)[:, None]
    return attention_drift(query[:, -QUERIES:], *wide, scale, mask.expand(query.shape[0], QUERIES, tokens)), served


@pytest.mark.real_model
def test_bounds_hold_on_a_near_prefix_pair(record_property: Callable[[str, object], None]) -> None:
    model, tokenizer = load_model("smollm2", dtype="float32")
    first, second = get_traffic("near_prefix").requests(tokenizer, 2)
    inputs = [attention_inputs(model, request.prompt[:PROMPT]) for request in (first, second)]
    for layer in LAYERS:
        drift, served = drift_of_layer(inputs[0][layer], inputs[1][layer])
        assert served > 0.5
        for name in ("logit_shift", "total_variation", "kl", "output"):
            bound = getattr(drift, name)
            assert bound.holds(), (layer, name)
            median, worst = float(bound.tightness.median()), float(bound.tightness.max())
            record_property(f"{name}_{layer}", (float(bound.bound.mean()), float(bound.actual.mean()), median, worst))
            print(
                f"layer {layer:2d} {name:15s} bound {float(bound.bound.mean()):.2e} actual "
                f"{float(bound.actual.mean()):.2e} tightness {median:.2e} (median) {worst:.2e} (largest)"
            )
            assert worst > 0
