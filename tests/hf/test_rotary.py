"""What layers do to keys with their position is read from the model and checked by running it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from jointkv.errors import UnsupportedModel
from jointkv.hf.identity import full_attention_layers
from jointkv.hf.rotary import rotary_of
from tests.hf.tiny_models import COMMON, build_model

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}
HALVES = {name: {} for name in ("llama", "qwen2", "mistral", "gemma", "gemma2", "gemma3", "diffllama", "jetmoe")}
OTHERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "cohere, neighbours": ("Cohere", {}, True),
    "glm, neighbours of a part": ("Glm", {"head_dim": 8, "partial_rotary_factor": 0.5}, True),
    "gpt-neox, halves of a part": ("GPTNeoX", {"rotary_pct": 0.25, "hidden_size": 64}, False),
    "phi, halves of a part": ("Phi", {"partial_rotary_factor": 0.5}, False),
}


def other(name: str, **changes: Any) -> PreTrainedModel:
    model, fields, _ = OTHERS[name]
    config = getattr(transformers, f"{model}Config")(**{**COMMON, **fields, **changes})
    torch.manual_seed(0)
    built: PreTrainedModel = getattr(transformers, f"{model}ForCausalLM")(config).eval()
    return built


def scaled(scaling: dict[str, Any]) -> PreTrainedModel:
    return build_model("llama", rope_parameters={"rope_theta": 10000.0, **scaling})


@torch.no_grad()
def keys_of(model: PreTrainedModel, tokens: torch.Tensor, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V `[tokens, heads, d]` of the full-attention layers for a text that begins at position `start`."""
    cache = DynamicCache(config=model.config)
    model(tokens[None], position_ids=start + torch.arange(len(tokens))[None], past_key_values=cache)
    layers = [cache.layers[layer] for layer in full_attention_layers(model)]
    return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in layers]


def assert_turned_keys_are_those_of_another_position(model: PreTrainedModel, tolerance: float = 2e-5) -> None:
    rotary = rotary_of(model, full_attention_layers(model))
    tokens = torch.randint(2, 90, (12,), generator=torch.Generator().manual_seed(1))
    here, there = keys_of(model, tokens, 3), keys_of(model, tokens, 240)
    for layer, (key, value), (moved_key, moved_value) in zip(rotary, here, there, strict=True):
        turned = layer.turn(key, torch.full((12,), 237))
        assert (turned - moved_key).norm() <= tolerance * moved_key.norm()
        assert (value - moved_value).norm() <= tolerance * moved_value.norm()
        back = layer.turn(turned, torch.full((12,), -237))
        assert (back - key).norm() <= tolerance * key.norm()
    assert any((one - two).norm() > 0.1 * two.norm() for (one, _), (two, _) in zip(here, there, strict=True))


@pytest.mark.parametrize("name", HALVES)
def test_models_that_turn_halves(name: str) -> None:
    attention = "eager" if name == "gemma2" else "sdpa"
    assert_turned_keys_are_those_of_another_position(build_model(name, attention=attention))


@pytest.mark.parametrize("name", OTHERS)
def test_other_ways_to_turn(name: str) -> None:
    model = other(name)
    assert_turned_keys_are_those_of_another_position(model)
    (ways,) = {layer.interleaved for layer in rotary_of(model, full_attention_layers(model))}
    assert ways is OTHERS[name][2]


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_positions(name: str) -> None:
    assert_turned_keys_are_those_of_another_position(scaled(SCALINGS[name]))


def test_layers_that_turn_nothing_and_layers_with_angles_of_their_own() -> None:
    layers = full_attention_layers(build_model("gemma3"))
    gemma = rotary_of(build_model("gemma3"), range(4))
    assert len({tuple(layer.frequencies.tolist()) for layer in gemma}) == 2
    assert {tuple(gemma[layer].frequencies.tolist()) for layer in layers} == {tuple(gemma[1].frequencies.tolist())}
    config = transformers.SmolLM3Config(**{**COMMON, "no_rope_layers": [1, 0, 1]})
    torch.manual_seed(0)
    without = transformers.SmolLM3ForCausalLM(config).eval()
    assert [len(layer.frequencies) for layer in rotary_of(without, range(3))] == [4, 0, 4]


def test_training_and_random_numbers_go_on() -> None:
    model, state = build_model("llama").train(), torch.get_rng_state()
    rotary_of(model, range(3))
    assert model.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: build_model("gpt2"), "K of layer 0 is not turned"),
        (lambda: scaled({"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
        (
            lambda: scaled(
                {
                    "rope_type": "longrope",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                }
            ),
            "longrope",
        ),
    ],
    ids=["learnt positions", "dynamic", "longrope"],
)
def test_what_depends_on_more_than_the_position_is_refused(model: Any, said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        rotary_of(model(), range(3))


def test_bfloat16() -> None:
    model = build_model("llama", dtype=torch.bfloat16)
    assert_turned_keys_are_those_of_another_position(model, tolerance=4e-2)
