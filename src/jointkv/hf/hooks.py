"""Forward hooks that tell a cache on pages of padding and text, and when a step begins and ends."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from jointkv.hf.attention import AttentionSwitch
from jointkv.hf.identity import takes_cache


def attach_hooks(model: PreTrainedModel) -> nn.Module:
    """Make `model` tell its caches of forward passes, and return the module that does. Repeating it changes nothing."""
    # `get_decoder` goes by the attribute `decoder`, which in some models is the output layer.
    decoder: nn.Module = next(part for part in (model.get_decoder(), model.base_model, model) if takes_cache(part))
    if hasattr(decoder, "_jointkv_attention"):
        return decoder
    decoder.register_forward_pre_hook(_before_forward, with_kwargs=True)
    # Also when the forward pass breaks off, because the model's attention is switched for its time only.
    decoder.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)
    decoder._jointkv_attention = AttentionSwitch(model.config.get_text_config(decoder=True))  # type: ignore[assignment]
    return decoder


def attention_of(decoder: nn.Module) -> AttentionSwitch:
    """What switches the attention of a module that `attach_hooks` returned: one for all pools of its model."""
    switch: Any = decoder._jointkv_attention
    return cast(AttentionSwitch, switch)


@torch.compiler.disable
def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    attention_of(module).off()  # torch calls no hook after a KeyboardInterrupt
    cache: Any = kwargs.get("past_key_values")
    if isinstance(cache, Cache) and hasattr(cache, "begin_step"):
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        cache.pool.check_decoder(module)
        names = ("inputs_embeds", "position_ids")
        cache.begin_step(kwargs.get("attention_mask"), input_ids, *(kwargs.get(name) for name in names))


@torch.compiler.disable
def _after_forward(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
    cache: Any = kwargs.get("past_key_values")
    if isinstance(cache, Cache) and hasattr(cache, "end_step"):
        cache.end_step()
