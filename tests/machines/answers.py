"""Models in which no token's K and V depend on what stands before it, and what they must answer, by transformers alone.

Whatever is shared, reused or moved then holds, up to rounding, what the request would have computed itself: any answer
that is not that of the plain model is a page that holds something else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from jointkv.hf import JointCache
from tests.hf.test_rotary import SCALINGS, other
from tests.hf.tiny_models import build_model


class HalfNorm(nn.Module):
    """A norm that divides by the size of the first half of each vector, so that this half comes out the same whatever
    is added to the second."""

    def __init__(self, norm: nn.Module, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        half = hidden[..., : hidden.shape[-1] // 2].float()
        size = (half.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return self.weight * (hidden.float() * size).to(hidden.dtype)


@torch.no_grad()
def forgetful(layers: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A Llama of several layers: K and V are made of the first half of the vectors, attention and MLP write to the
    second; both halves are read for queries and for the answer."""
    model = build_model("llama", dtype, num_hidden_layers=layers)
    half = model.config.hidden_size // 2
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.k_proj.weight[:, half:] = attention.v_proj.weight[:, half:] = 0
        attention.o_proj.weight[:half] = layer.mlp.down_proj.weight[:half] = 0
        layer.input_layernorm = HalfNorm(layer.input_layernorm)
    return model.eval()


def _one(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> Callable[[], PreTrainedModel]:
    return lambda: build_model(name, dtype, num_hidden_layers=1, **changes)


def _scaled(kind: str) -> Callable[[], PreTrainedModel]:
    return _one("llama", rope_parameters={"rope_theta": 10000.0, **SCALINGS[kind]})


def _first(name: str) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        model = other(name, num_hidden_layers=1)
        return model

    return build


KINDS: Mapping[str, Callable[[], PreTrainedModel]] = MappingProxyType(
    {
        "llama": _one("llama"),
        "three layers": lambda: forgetful(3),
        "eager": _one("qwen2", attention="eager"),
        "bfloat16": lambda: forgetful(2, torch.bfloat16),
        **{kind: _scaled(kind) for kind in SCALINGS},
        **{name: _first(name) for name in ("glm, neighbours of a part", "phi, halves of a part")},
        "learnt positions": _one("gpt2", n_layer=1),
        "latent": _one("deepseek_v3"),
        "sliding": lambda: build_model("gemma3"),
    }
)
MIXED, FIXED = frozenset({"sliding"}), frozenset({"learnt positions", "latent"})
"""Those that only fuse, so that what they store may depend on anything, and those whose text cannot move."""


def positions_of(mask: Tensor) -> Tensor:
    """Of each token, as `generate` counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@dataclass(eq=False)
class Talk:
    """Some sequences, their cache, and what transformers says of their text.

    Attributes:
        ids, mask: of all tokens said `[rows, length]`, also of those that are not in the cache.
        held: leading columns that are in the cache.
        keys: its isolation key, or one for each row.
        old: whether it began under other weights, so that nobody knows what it holds.
    """

    cache: JointCache
    ids: Tensor
    mask: Tensor
    keys: Hashable | list[Hashable]
    held: int = 0
    old: bool = False
    _true: tuple[Tensor, DynamicCache] | None = field(default=None, repr=False)
    _of: Tensor | None = field(default=None, repr=False)

    def add(self, ids: Tensor, mask: Tensor | None = None) -> None:
        self.ids = torch.cat((self.ids, ids), 1)
        self.mask = torch.cat((self.mask, torch.ones_like(ids) if mask is None else mask), 1)

    def cut(self, length: int) -> None:
        self.ids, self.mask, self.held = self.ids[:, :length], self.mask[:, :length], min(self.held, length)

    def select(self, rows: list[int]) -> None:
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def twin(self, cache: JointCache) -> Talk:
        """Another one of the same text."""
        return Talk(cache, self.ids, self.mask, cache.isolation_key, self.held, self.old)

    @torch.no_grad()
    def true(self, model: PreTrainedModel) -> tuple[Tensor, DynamicCache]:
        """Logits `[rows, length, vocabulary]` of the plain `model` for the text, and its K and V."""
        whole = torch.stack((self.ids, self.mask))
        if self._true is None or self._of is None or not torch.equal(whole, self._of):
            cache = DynamicCache(config=model.config)
            answer = model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=positions_of(self.mask),
                past_key_values=cache,
                use_cache=True,
            )
            self._true, self._of = (answer.logits, cache), whole
        return self._true

    def forget(self) -> None:
        """The weights are others now."""
        self._true = None


@dataclass
class Distance:
    """How far answers, and K and V, are from the true ones, over the largest true one; NaN is as far as can be."""

    allowed: float
    largest: float = 0.0

    def compare(self, found: Tensor, true: Tensor, seen: Tensor, what: str) -> None:
        """Of `[rows, n, ...]` what `seen [rows, n]`. Raises AssertionError: farther than allowed."""
        assert found.shape == true.shape, f"{what}: {list(found.shape)} instead of {list(true.shape)}"
        here, there = found[seen].float(), true[seen].float()
        if not here.numel():
            return
        far = float((here - there).abs().max() / there.abs().max())
        assert far <= self.allowed, f"{what}: {far:.3g} from the true ones"  # so that not-a-number fails
        self.largest = max(self.largest, far)


def compare_states(talk: Talk, model: PreTrainedModel, distance: Distance) -> None:
    """K and V in the cache, as a layer of transformers shows them, against the plain model's."""
    _, true = talk.true(model)
    seen = talk.mask[:, : talk.held].bool()
    for number, (layer, plain) in enumerate(zip(talk.cache.layers, true.layers, strict=True)):
        if layer.is_sliding:
            continue
        for side in ("keys", "values"):
            found, expected = getattr(layer, side), getattr(plain, side)
            distance.compare(
                found.transpose(1, 2), expected[:, :, : talk.held].transpose(1, 2), seen, f"{side} of layer {number}"
            )
