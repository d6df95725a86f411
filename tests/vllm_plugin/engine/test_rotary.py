"""How an engine's layers turn keys is taken from its rotary embeddings, and only where running them shows the same."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from torch import Tensor, nn

from jointkv.errors import UnsupportedEngine
from jointkv.vllm_plugin.engine.rotary import rotary_of

HEADS, SIZE, HIDDEN, CONTEXT = 2, 16, 24, 256
BASE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
KINDS: dict[str, dict[str, Any]] = {
    "halves": {},
    "neighbours": {"is_neox_style": False},
    "partial": {"rope_parameters": {**BASE, "partial_rotary_factor": 0.5}},
    "linear": {"rope_parameters": {**BASE, "rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_parameters": {**BASE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "llama3": {
        "rope_parameters": {
            **BASE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


class Attention(nn.Module):
    """Where pages would be written."""

    num_kv_heads = HEADS

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise AssertionError("attention is not to be run")


class Layer(nn.Module):
    """Makes Q, K and V as vLLM's layers do; `odd` does something to K that no rotary embedding does."""

    def __init__(self, rotary: nn.Module | None, odd: bool = False) -> None:
        super().__init__()
        self.qkv, self.rotary_emb, self.attn = nn.Linear(HIDDEN, 3 * HEADS * SIZE), rotary, Attention()
        self._odd = odd

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden_states).chunk(3, -1)
        query, key = query.contiguous(), key.contiguous()
        if self.rotary_emb is not None:
            query, key = self.rotary_emb(positions, query, key)
        if self._odd:
            key = key * (1 + positions[:, None])
        return self.attn(query, key, value)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _vllm_config() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def rotary(kind: str = "halves", positions: int = CONTEXT) -> nn.Module:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    options = {"rope_parameters": BASE, "is_neox_style": True, **KINDS[kind]}
    return get_rope(SIZE, max_position=positions, dtype=torch.float32, **options)


def runner(*layers: Layer, context: int = CONTEXT) -> tuple[Any, dict[str, Any]]:
    model = nn.ModuleList(layers)
    config = SimpleNamespace(max_model_len=context, dtype=torch.float32, get_hidden_size=lambda: HIDDEN)
    found = SimpleNamespace(
        get_model=lambda: model, vllm_config=SimpleNamespace(model_config=config), device=torch.device("cpu")
    )
    return found, {f"layers.{number}": layer.attn for number, layer in enumerate(layers)}


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_turned_as_the_model_turns_them(kind: str) -> None:
    layer = Layer(rotary(kind))
    (found,) = rotary_of(*runner(layer))
    assert found.interleaved == (kind == "neighbours") and len(found.frequencies) == SIZE // (
        4 if kind == "partial" else 2
    )
    key, far = torch.randn(5, HEADS * SIZE), torch.tensor([3, 50, 0, 199, 120])
    near = torch.tensor([1, 90, 7, 4, 120])
    turn = layer.rotary_emb
    assert turn is not None
    before, after = (turn(places, key.clone(), key.clone())[1].view(5, HEADS, SIZE) for places in (near, far))
    assert torch.allclose(found.turn(before, far - near), after, atol=2e-4)


def test_each_layer_by_itself() -> None:
    found = rotary_of(*runner(Layer(rotary()), Layer(None), Layer(rotary("linear"))))
    assert [len(each.frequencies) for each in found] == [SIZE // 2, 0, SIZE // 2]
    assert not torch.equal(found[0].frequencies, found[2].frequencies)


class Wrapped(nn.Module):
    """Stands for a layer with adapters before a step has said which."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        raise IndexError("no adapter")


def test_adapters_are_passed_over() -> None:
    layer = Layer(rotary())
    layer.qkv = wrapped = Wrapped(layer.qkv)  # type: ignore[assignment]
    (found,) = rotary_of(*runner(layer))
    assert len(found.frequencies) == SIZE // 2 and layer.qkv is wrapped


@pytest.mark.parametrize(
    ("layers", "context", "cause"),
    [
        (lambda: [Layer(rotary(), odd=True)], CONTEXT, "layers.0.*not turned with its position"),
        (lambda: [Layer(None), Layer(None)], CONTEXT, "tells positions in another way"),
        (lambda: [Layer(rotary(positions=64))], CONTEXT, "end after 64 positions.*max-model-len is 256"),
    ],
)
def test_what_is_turned_in_another_way_is_refused(layers: Any, context: int, cause: str) -> None:
    with pytest.raises(UnsupportedEngine, match=cause):
        rotary_of(*runner(*layers(), context=context))


def test_a_module_that_is_called_in_another_way_is_refused() -> None:
    class Other(Layer):
        def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
            return hidden_states

    with pytest.raises(UnsupportedEngine, match="cannot be run alone: TypeError"):
        rotary_of(*runner(Layer(rotary()), Other(None)))
