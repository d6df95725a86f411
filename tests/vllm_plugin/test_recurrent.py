"""A model whose layers are partly recurrent: full attention is fused, states are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from vllm.v1.kv_cache_interface import MambaSpec

from tests.hazards import FIRST
from tests.vllm_plugin.engines import EXACT, LOSSY, VOCABULARY, Engine, engine, near_prefix, random_model, text

OUT = 40
LIMITS: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 512, "max_num_batched_tokens": 256}
CROWD = [text(100, number // 2) + text(60, 99) for number in range(12)]
NEAR = near_prefix(4, shared=300, head=32)

pytestmark = pytest.mark.runs("recurrent layers", *FIRST)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-Next of two layers with linear attention and two with full."""
    folder, kinds = tmp_path_factory.mktemp("recurrent"), ["linear_attention", "full_attention"] * 2
    config = Qwen3NextConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=len(kinds),
        num_attention_heads=4,
        # As many bytes a token as make a block of 32 as large as a state, to which vLLM enlarges blocks.
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        layer_types=kinds,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        dtype="bfloat16",
        architectures=["Qwen3NextForCausalLM"],
    )
    random_model(Qwen3NextForCausalLM, config, embeddings=0.2).save_pretrained(folder)
    return folder


def crowd(served: Engine) -> list[list[int]]:
    """Answers of those who stay."""
    names = [served.submit(prompt, OUT) for prompt in CROWD]
    for step in range(9):
        served.step()
        if step in (3, 6):
            served.abort(names[step])
    served.finish()
    return [served.outputs[name] for name in names if name not in (names[3], names[6])]


def test_bound_zero_changes_no_token(recurrent: Path) -> None:
    with engine(recurrent, **LIMITS, enable_prefix_caching=False) as plain:
        expected = crowd(plain)
    with engine(recurrent, fusion=EXACT, **LIMITS, enable_prefix_caching=False) as served:
        assert crowd(served) == expected
        assert served.statistics["blocks_merged"] > 0 and served.side.recovery.cause is None
        served.assert_drained()


def test_states_behind_approximated_blocks_are_found_by_nobody_else(recurrent: Path) -> None:
    with engine(recurrent, 52, {**LOSSY, "reuse": "auto"}, **LIMITS) as served:
        kinds = [type(group.kv_cache_spec) for group in served.vllm_scheduler.kv_cache_config.kv_cache_groups]
        assert MambaSpec in kinds and served.side.report().data["no_reuse"] is not None
        served.generate(NEAR)
        merged = served.statistics["blocks_merged"]
        served.generate(NEAR, extra={"jointkv": False})
        assert served.statistics["blocks_merged"] == merged > 2 * len(NEAR)
        assert 0 < served.cached_tokens <= len(NEAR[0]), "those of the one whose blocks serve the others"
        assert all(len(tokens) == OUT for tokens in crowd(served)) and served.preempted > 0
        assert served.side.recovery.cause is None
        served.assert_drained()
