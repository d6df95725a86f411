"""What a model of transformers is: which of its layers have pages, and what profiles and saved caches know it by."""

from __future__ import annotations

import hashlib
import inspect
import json
import weakref
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from jointkv.errors import UnsupportedModel, UnsupportedUse
from jointkv.policy.identity import ModelIdentity, checkpoint_fingerprint, checkpoint_folder


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the layers whose cache is a plain growing one.

    Raises:
        UnsupportedUse, UnsupportedModel: see `JointPool`.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not isinstance(config, PreTrainedConfig):
        raise UnsupportedUse(
            f"a {type(model).__name__} is no model of transformers: load one, with "
            "AutoModelForCausalLM.from_pretrained(name)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{type(model).__name__} is an encoder-decoder; only decoder-only models are supported")
    decoder = config.get_text_config(decoder=True)
    # Of the family of BERT, where the same class is both: others that have one of the fields lack the other.
    if hasattr(decoder, "add_cross_attention") and getattr(decoder, "is_decoder", True) is False:
        raise UnsupportedModel(f"{type(model).__name__} is an encoder; only decoder-only models are supported")
    if not takes_cache(model) or not hasattr(decoder, "num_hidden_layers"):
        raise UnsupportedModel(f"{type(model).__name__} has no KV cache")
    try:
        layers = DynamicCache(config=decoder).layers
    except (KeyError, AttributeError, TypeError) as error:
        raise UnsupportedModel(f"{type(model).__name__}: its cache layers are unknown ({error})") from error
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) and type(layer).__name__ != "DummyLayer":
            raise UnsupportedModel(f"layer {index} of {type(model).__name__} needs a {type(layer).__name__}")
    full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not full:
        raise UnsupportedModel(f"{type(model).__name__} has sliding-window layers only; they are left alone")
    return full


def model_identity(model: PreTrainedModel) -> ModelIdentity:
    """What a profile of `model` is bound to."""
    config = model.config.get_text_config(decoder=True)
    folder = checkpoint_folder(model.config._name_or_path) if model.config._name_or_path else None
    return ModelIdentity(
        name=Path(model.config._name_or_path).name or type(model).__name__,
        layers=len(full_attention_layers(model)),
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        checkpoint=None if folder is None else checkpoint_fingerprint(folder),
        weights=model_fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the model's shape and of a few weights of every parameter: equal for equal models."""
    config = model.config.get_text_config(decoder=True)
    fields = config.to_dict()
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += tuple(name for name in fields if name.startswith("rope"))
    shape = {name: fields.get(name) for name in names}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        sample = parameter.detach().flatten()[:16].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a model at one moment; pages that other weights have computed are never offered to new requests.

    Attributes:
        fingerprint: see `model_fingerprint`.
        mark: what tells cheaply that they were changed, see `weights_mark`.
        named: parameters that `mark` knows by their ids, which others may have when these are gone.
    """

    fingerprint: str
    mark: bytes
    named: tuple[weakref.ref[Tensor], ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Weights:
        named = tuple(weakref.ref(parameter) for parameter in model.parameters() if not _is_plain(parameter.detach()))
        return cls(model_fingerprint(model), weights_mark(model), named)

    def are_of(self, model: PreTrainedModel) -> bool:
        """Whether they are those that `model` has now."""
        return weights_mark(model) == self.mark and all(parameter() is not None for parameter in self.named)


def _is_plain(held: Tensor) -> bool:
    """One that is cut up or quantised by a class of its own has no place in memory to look at."""
    return type(held) is Tensor


def weights_mark(model: PreTrainedModel) -> bytes:
    """Of every parameter its place in memory, its version, and the number in its middle.

    Whoever changes parameters in place raises their version; who does so through `.data` is seen by the numbers, unless
    they are not among those that were changed.
    """
    places: list[int] = []
    numbers: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for parameter in model.parameters():
        held = parameter.detach()
        plain = _is_plain(held)
        places += held.data_ptr() if plain else id(parameter), 0 if parameter.is_inference() else parameter._version
        if plain and held.numel() and not held.is_meta:
            middle = sum(size // 2 * stride for size, stride in zip(held.shape, held.stride(), strict=True))
            numbers[held.device, held.dtype].append(held.as_strided((1,), (1,), held.storage_offset() + middle))
    digest = hashlib.sha256(repr(places).encode())
    for side in numbers.values():
        digest.update(torch.cat(side).cpu().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def takes_cache(module: nn.Module) -> bool:
    """Whether a module can be given a KV cache."""
    return "past_key_values" in inspect.signature(module.forward).parameters
