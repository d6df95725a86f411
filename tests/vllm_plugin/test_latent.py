"""Multi-head latent attention: what a page stores is compared, and shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from tests.hazards import FIRST
from tests.vllm_plugin.engines import EXACT, LOSSY, VOCABULARY, engine, near_prefix, random_model, text

LATENT, ROTARY = 512, 64
"""The only sizes that vLLM's CPU kernel is built for."""

OPTIONS: dict[str, Any] = {"attention_config": {"backend": "CPU_MLA"}, "block_size": 16, "max_model_len": 400}
EQUAL = [text(90, number // 2) for number in range(6)]
NEAR = near_prefix(4, shared=300, head=32)

pytestmark = pytest.mark.runs("latent attention", *FIRST)


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V2 of two layers without experts."""
    folder = tmp_path_factory.mktemp("latent")
    config = DeepseekV2Config(
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=LATENT,
        q_lora_rank=None,
        qk_rope_head_dim=ROTARY,
        qk_nope_head_dim=32,
        v_head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="float32",
        architectures=["DeepseekV2ForCausalLM"],
    )
    random_model(DeepseekV2ForCausalLM, config).save_pretrained(folder)
    return folder


def test_bound_zero_changes_no_token(latent: Path) -> None:
    with engine(latent, **OPTIONS, enable_prefix_caching=False) as plain:
        expected = plain.generate(EQUAL, 12)
    with engine(latent, fusion=EXACT, **OPTIONS, enable_prefix_caching=False) as served:
        assert served.generate(EQUAL, 12) == expected
        assert served.statistics["blocks_merged"] > 0 and served.side.recovery.cause is None
        served.assert_drained()


def test_latent_vectors_and_rotary_keys_are_what_is_compared(latent: Path) -> None:
    with engine(latent, fusion={**LOSSY, "reuse": "auto"}, **OPTIONS) as served:
        assert served.side.report().data["no_reuse"] == "prefix_caching", "vLLM's CPU build has none beside it"
        answers = served.generate(NEAR, 12)
        layers = served.core.vllm_config.compilation_config.static_forward_context.values()
        stored = torch.stack([layer.kv_cache[2] for layer in layers])
        (pages,) = get_kv_transfer_group().worker.comparer.groups.values()
        keys, values = pages.vectors(torch.tensor([2]))
        assert stored.any() and torch.equal(values.view(-1, 16, LATENT), stored[..., :LATENT])
        assert torch.equal(keys.view(-1, 16, ROTARY), stored[..., LATENT:])
        assert all(len(tokens) == 12 for tokens in answers)
        assert served.statistics["blocks_merged"] > len(NEAR) and served.statistics["faults"] == 0
        served.assert_drained()
