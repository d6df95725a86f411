"""A pool takes models and settings that it can serve, and follows the profile that it is given."""

import pytest
import torch

from jointkv.errors import BadInput, InvalidPolicy, JointKVError, LayoutError, ModelMismatch, UnsupportedModel
from jointkv.hf.cache import JointCache
from jointkv.hf.identity import model_fingerprint, model_identity
from jointkv.hf.pool import JointPool
from jointkv.policy import FusionPolicy
from tests.core.profiles import make_profile
from tests.hf.tiny_models import (
    BLOCK,
    build_mamba,
    build_model,
    build_rwkv,
    build_t5,
    duplicates,
    feed,
    generate,
    joint,
)

ROWS, BLOCKS = 8, 6


def near_duplicates(error, seed=0):
    """K and V `[layers, rows, h, n, d]` in which every row differs from the first by about `error`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 1, 2, BLOCKS * BLOCK, 8)
    base = torch.randn(shape, generator=generator).expand(2, 3, ROWS, 2, BLOCKS * BLOCK, 8)
    noise = torch.randn(base.shape, generator=generator)
    noise[:, :, 0] = 0
    return base + error * noise


def pool_of(loaded, **fields):
    profile = make_profile(**{"model": model_identity(loaded), "block_size": BLOCK, **fields})
    return JointPool(loaded, profile, block_size=BLOCK)


def test_the_thresholds_of_a_profile_are_in_force():
    model = build_model("llama")
    pool = pool_of(model, bounds=(0.1, 0.2, 0.3))
    assert pool.groups.count == 3 and pool.policy.max_relative_error == (0.1, 0.2, 0.3)
    cache = JointCache(pool)
    feed(cache, *near_duplicates(0.15))
    held = [len(table.held().unique()) for table in cache.tables]
    assert held[0] == ROWS * BLOCKS and held[1] < ROWS * BLOCKS and held[2] == BLOCKS
    assert pool.faults == 0


def test_another_model_or_block_size_is_refused():
    model = build_model("llama")
    with pytest.raises(ModelMismatch, match="other weights"):
        pool_of(model, model=model_identity(build_model("llama", seed=1)))
    with pytest.raises(BadInput, match="--block-size 4"):
        pool_of(model, block_size=16)
    with pytest.raises(InvalidPolicy, match="goes with a profile"):
        JointPool(model, "safe", max_relative_error=0.1)


def test_the_bound_tightens_on_traffic_with_larger_errors_and_says_so(caplog):
    caplog.set_level("INFO", logger="jointkv")
    pool = pool_of(build_model("llama"), bounds=(0.4,), distortion=1e-4)
    pool.adaptation.controllers[0].window = ROWS * BLOCKS
    before = pool.policy.max_relative_error
    for seed in range(3):
        feed(JointCache(pool), *near_duplicates(0.2, seed))
    after = pool.policy.max_relative_error
    assert after[0] < before[0] and pool.fusers["batch"].policy.max_relative_error == after
    assert pool.stats()["bounds_moved"] == {"tighten": 1, "loosen": 0}
    assert [record.message for record in caplog.records if "tightened the bound of layer group 0" in record.message]
    assert pool.faults == 0


def test_the_bound_stays_on_the_traffic_that_was_calibrated():
    pool = pool_of(build_model("llama"), bounds=(0.4,), distortion=0.2**2 * (ROWS - 1) / ROWS, acceptance=1 - 1 / ROWS)
    pool.adaptation.controllers[0].window = ROWS * BLOCKS
    for seed in range(6):
        feed(JointCache(pool), *near_duplicates(0.2 / 1.3, seed))
    assert pool.stats()["bounds_moved"] == {"tighten": 0, "loosen": 0}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (build_t5, "T5ForConditionalGeneration is an encoder-decoder"),
        (build_mamba, r"MambaForCausalLM (has no KV cache|.*LinearAttentionLayer)"),
        (build_rwkv, "RwkvForCausalLM has no KV cache"),
        (lambda: build_model("mistral_sliding"), "MistralForCausalLM has sliding-window layers only"),
    ],
    ids=["t5", "mamba", "rwkv", "sliding"],
)
def test_unsupported_models_are_refused_by_name(build, reason):
    model = build()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=reason):
        JointPool(model)
    assert model.config._attn_implementation == before


def test_pools_refuse_settings_that_do_not_fit_the_model():
    model = build_model("llama")
    with pytest.raises(InvalidPolicy, match="block_size"):
        JointPool(model, block_size=0)
    with pytest.raises(InvalidPolicy, match="chunk_tokens"):
        JointPool(model, FusionPolicy(scope="chunk", chunk_tokens=30), block_size=16)
    with pytest.raises(InvalidPolicy, match="layer_groups"):
        JointPool(model, FusionPolicy(layer_groups=2))
    with pytest.raises(JointKVError, match="preset"):
        JointPool(model, "fast")


def test_states_of_another_shape_are_refused():
    _, pool = joint("llama")
    cache = JointCache(pool)
    states = torch.randn(1, 2, 5, 8)
    cache.layers[0].update(states, states)
    other = JointCache(pool)
    with pytest.raises(LayoutError, match="do not fit pages"):
        other.layers[0].update(states[:, :1], states[:, :1])
    assert other.pages == 0
    pool.check_integrity()


def test_fingerprints_tell_weights_and_shapes_apart():
    first = model_fingerprint(build_model("llama"))
    assert first == model_fingerprint(build_model("llama"))
    others = [build_model("llama", seed=1), build_model("qwen2"), build_model("llama", num_hidden_layers=2)]
    # Shape and weights agree, positions do not.
    others.append(build_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    assert first not in [model_fingerprint(model) for model in others]


def test_a_second_pool_of_one_model_is_independent():
    model, first = joint("llama", "safe")
    second = JointPool(model, "off", block_size=8)
    kept = JointCache(first)
    generate(model, duplicates(3, 18), kept)
    generate(model, duplicates(3, 18), JointCache(second))
    assert second.stats()["pages_used"] == 0 and kept.pages < kept.references
    assert len(model.model._forward_hooks) == 1
