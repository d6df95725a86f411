"""Between models of transformers and stored pages: what a store knows a model by, its transform, its caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from jointkv.codec.base import Aids
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.registry import decode, encode, get_codec
from jointkv.codec.transform import Transform
from jointkv.core.bookkeeping import bookkeeping
from jointkv.errors import BadInput, LayoutError, UnsupportedModel
from jointkv.hf.identity import full_attention_layers
from jointkv.hf.modes import evaluating
from jointkv.hf.rotary import rotary_of

SCORED_TOKENS = 24
COARSE_LEVEL = 8
"""Coarse enough that one layer's harm shows over rounding; see `jointkv.codec.base.step_share`."""

LEAST_HARM = 1e-7
WEIGHT_RANGE = 3.0
"""Beyond it what was measured is noise."""


@bookkeeping
def prefill_pages(
    model: PreTrainedModel, tokens: Sequence[int], block_size: int, dtype: torch.dtype | None = None
) -> Pages:
    """Compute a prompt, in evaluation mode and without autocast; its whole blocks, in `dtype` or that of the model.

    Raises:
        UnsupportedModel, UnsupportedUse: see `check_layers`.
    """
    check_layers(model)
    cache = DynamicCache(config=model.config)
    with evaluating(model):
        model(input_ids=torch.tensor([list(tokens)], device=model.device), past_key_values=cache, logits_to_keep=1)
    return pages_of(cache, block_size, dtype)


def pages_of(cache: DynamicCache, block_size: int, dtype: torch.dtype | None = None, row: int = 0) -> Pages:
    """The pages of the whole blocks of a row that begins at position 0, without padding."""
    sides: list[Tensor] = []
    for name in ("keys", "values"):
        layers = torch.stack([getattr(layer, name)[row] for layer in cache.layers]).detach().cpu()
        blocks = layers.shape[2] // block_size
        cut = layers[:, :, : blocks * block_size].transpose(1, 2)
        sides.append(cut.unflatten(1, (blocks, block_size)).to(dtype or layers.dtype))
    return Pages(sides[0], sides[1], block_size * torch.arange(sides[0].shape[1]))


def cache_of(model: PreTrainedModel, pages: Pages) -> DynamicCache:
    """A cache of one row that begins with `pages`; the model goes on behind them.

    Raises:
        LayoutError: pages that do not follow each other from position 0 on, or of other layers.
    """
    cache = DynamicCache(config=model.config)
    size = pages.layout.block_size
    if not torch.equal(pages.positions, size * torch.arange(len(pages))):
        raise LayoutError("a cache begins with the pages of one prompt, in order, from its first token on")
    if pages.layout.layers != len(cache.layers):
        raise LayoutError(f"pages of {pages.layout.layers} layers for a model with {len(cache.layers)}")
    for layer, (keys, values) in enumerate(zip(pages.keys, pages.values, strict=True)):
        key, value = (side.flatten(0, 1).transpose(0, 1)[None].to(model.device, model.dtype) for side in (keys, values))
        cache.update(key, value, layer)
    return cache


def fit_transform(model: PreTrainedModel, texts: Sequence[Sequence[int]], block_size: int) -> Transform:
    """The transform of a model, from prefills of `texts` (token ids) that are like what it will see.

    Raises:
        BadInput: they fill too few blocks.
        UnsupportedModel, UnsupportedUse: see `check_layers`; or its keys turn in a way that cannot be undone.
    """
    check_layers(model)
    samples = [prefill_pages(model, text, block_size, torch.float32) for text in texts if len(text) >= block_size]
    if not samples:
        raise BadInput(f"no text fills a block of {block_size} tokens")
    joined = Pages.joined(samples)
    return Transform.fit(joined, rotary_of(model, range(joined.layout.layers)))


@bookkeeping
def step_weights(
    model: PreTrainedModel, transform: Transform, texts: Sequence[Sequence[int]], block_size: int
) -> Tensor:
    """How much coarser K and V of each layer may be quantised at the same harm, `[2, layers]`; see `weighted`.

    One side of one layer at a time is quantised, and the KL of the next tokens measured. It grows with the square of
    the step, so steps by its square root let all layers contribute alike, which is what few bits ask for.

    Args:
        texts: token ids, the last `SCORED_TOKENS` of which are scored; two or three are enough.

    Raises:
        BadInput: a text fills no block before the tokens that are scored.
    """
    aids = Aids(transform, level=COARSE_LEVEL)
    harm = torch.zeros(2, len(transform.rotary))
    for text in texts:
        pages = prefill_pages(model, text[:-SCORED_TOKENS], block_size)
        if not len(pages):
            raise BadInput(f"a text of {len(text)} tokens fills no block before its last {SCORED_TOKENS}")
        decoded = decode(encode(get_codec("alone"), pages, aids), pages.layout, pages.positions, aids)
        rest = text[len(pages) * block_size :]
        expected = _log_probabilities(model, pages, rest)
        for layer in range(harm.shape[1]):
            for side, name in enumerate(("keys", "values")):
                mixed = Pages(pages.keys.clone(), pages.values.clone(), pages.positions)
                getattr(mixed, name)[layer] = getattr(decoded, name)[layer]
                found = _log_probabilities(model, mixed, rest)
                harm[side, layer] += (expected.exp() * (expected - found)).sum(-1).mean()
    weights = harm.clamp(min=LEAST_HARM).rsqrt()
    return (weights / weights.log().mean().exp()).clamp(1 / WEIGHT_RANGE, WEIGHT_RANGE)


def _log_probabilities(model: PreTrainedModel, pages: Pages, tokens: Sequence[int]) -> Tensor:
    """Of the tokens behind each of the last `SCORED_TOKENS`."""
    inputs = torch.tensor([list(tokens)], device=model.device)
    with evaluating(model):
        logits = model(inputs, past_key_values=cache_of(model, pages), logits_to_keep=SCORED_TOKENS).logits[0]
    return logits.float().log_softmax(-1).cpu()


def layout_of(model: PreTrainedModel, block_size: int, dtype: torch.dtype | None = None) -> Layout:
    """Of the model's pages. Raises UnsupportedModel, UnsupportedUse: see `check_layers`."""
    return prefill_pages(model, [0] * block_size, block_size, dtype).layout


def check_layers(model: PreTrainedModel) -> None:
    """Raises UnsupportedModel, UnsupportedUse unless every layer has full attention and K and V of one shape."""
    full = full_attention_layers(model)
    cache = DynamicCache(config=model.config)
    if len(full) != len(cache.layers) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise UnsupportedModel("stored pages need full attention in every layer; others keep a window or a state")
