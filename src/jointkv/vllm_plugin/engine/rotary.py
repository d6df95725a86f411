"""How each layer of an engine's model turns keys with their position: read from the model, checked by running it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from jointkv.attention.rotary import NOT_TURNED, Rotary, far, that_turns
from jointkv.errors import UnsupportedEngine

SHIFTS = (1, 7, 100, 1000)
PROBES = 16
"""Tokens of which K and V are computed, at two positions each."""


class _Reached(Exception):
    """K and V have come to the attention of a layer."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value


@torch.inference_mode()
def rotary_of(runner: Any, layers: Mapping[str, Any]) -> list[Rotary]:
    """How each of the attention `layers`, by name, turns its keys.

    The module around a layer makes Q, K and V of hidden states and positions. It is run on the same hidden states at
    two positions each, near the beginning and at the end of the context, as far as the attention, which is not run: K
    may differ by the turning that one of the model's rotary embeddings describes, and V not at all.

    Args:
        runner: vLLM's model runner, with its model loaded.

    Raises:
        UnsupportedEngine: K of a layer depends on its position in another way, or on the length of the context, or the
            module is not called as it is here.
    """
    model, context = runner.get_model(), int(runner.vllm_config.model_config.max_model_len)
    around = {id(child): module for module in model.modules() for child in module.children()}
    candidates, (before, after) = list(_candidates(model, context)), _positions(context)
    hidden = _hidden_states(runner)
    found = []
    for name, layer in layers.items():
        module = around.get(id(layer))
        if module is None:
            raise _refused(name, "no module stands around its attention")
        (key, value), (turned, same) = (_computed(name, module, layer, hidden, places) for places in (before, after))
        rotary = None
        if far(value, same) <= 10 * torch.finfo(value.dtype).eps:
            rotary = that_turns(key, turned, after - before, candidates)
        if rotary is None:
            raise _refused(name, "its K is not turned with its position as rotary embeddings do")
        found.append(rotary)
    if not any(len(rotary.frequencies) for rotary in found):
        raise UnsupportedEngine(
            "moved=true turns keys by rotary embeddings, and this model tells positions in another way; drop moved=true"
        )
    return found


def _candidates(model: torch.nn.Module, context: int) -> Iterator[Rotary]:
    """What the model's rotary embeddings say, each once, and turning nothing at all.

    Raises:
        UnsupportedEngine: there are fewer angles than positions.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    yield NOT_TURNED
    seen: list[tuple[Tensor, bool]] = []
    for module in model.modules():
        if not isinstance(module, RotaryEmbeddingBase) or not hasattr(module, "cos_sin_cache"):
            continue
        # Not the table in use, which may be of half precision.
        table = module._compute_cos_sin_cache()
        if len(table) < context:
            raise UnsupportedEngine(
                f"moved=true turns keys by the model's angles, which end after {len(table)} positions, and "
                f"--max-model-len is {context}; lower it, or drop moved=true"
            )
        cos, sin = table[1].double().cpu().chunk(2)
        frequencies = torch.atan2(sin, cos)
        kind = (frequencies, not module.is_neox_style)
        if not any(torch.equal(frequencies, other) and kind[1] == style for other, style in seen):
            seen.append(kind)
            yield Rotary(*kind)


def _positions(context: int) -> tuple[Tensor, Tensor]:
    """Positions to compare, `[PROBES]` each: from the first one on, and up to the last one of the context."""
    shift = torch.tensor([min(shift, context - 1) for shift in SHIFTS]).repeat(PROBES // len(SHIFTS))
    late = torch.arange(PROBES) >= PROBES // 2
    before = torch.where(late, context - 1 - shift, 0)
    return before, before + shift


def _hidden_states(runner: Any) -> Tensor:
    config = runner.vllm_config.model_config
    generator = torch.Generator().manual_seed(0)
    return torch.randn(PROBES, config.get_hidden_size(), generator=generator).to(runner.device, config.dtype)


def _computed(name: str, module: torch.nn.Module, layer: Any, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """K `[PROBES, heads, size]` and V of the hidden states, as they come to the attention `layer`."""
    signature = inspect.signature(layer.forward)

    def stop(_: object, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = signature.bind(*args, **options).arguments
        raise _Reached(given["key"], given["value"])

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with _without_adapters(module):
            module(positions=places.to(hidden.device), hidden_states=hidden.clone())
    except _Reached as reached:
        return tuple(  # type: ignore[return-value]
            side.detach().clone().view(PROBES, layer.num_kv_heads, -1).cpu() for side in (reached.key, reached.value)
        )
    except Exception as error:
        raise _refused(name, f"the module around it cannot be run alone: {type(error).__name__}: {error}") from error
    finally:
        hook.remove()
    raise _refused(name, "the module around it never comes to it")


@contextmanager
def _without_adapters(module: torch.nn.Module) -> Iterator[None]:
    """Inside, layers with LoRA adapters are those that they were made of: which adapter is meant only a step says."""
    wrapped = {name: child for name, child in module.named_children() if hasattr(child, "base_layer")}
    for name, child in wrapped.items():
        setattr(module, name, child.base_layer)
    try:
        yield
    finally:
        for name, child in wrapped.items():
            setattr(module, name, child)


def _refused(name: str, why: str) -> UnsupportedEngine:
    return UnsupportedEngine(f"moved=true turns keys, and of layer {name} it is not known how: {why}; drop moved=true")
