"""A model whose layers are partly sliding windows: full attention is fused, windows are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.vllm_plugin.engines import LOSSY, VOCABULARY, engine, near_prefix

WINDOW = 64


def write_windowed(folder: Path) -> Path:
    """A random Gemma 3 of two layers with a window and two without."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=len(kinds),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        sliding_window=WINDOW,
        layer_types=kinds,
        dtype="float32",
        architectures=["Gemma3ForCausalLM"],
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_tables_of_windows_are_no_fault_and_nothing_is_reused(tmp_path: Path) -> None:
    """Windows give pages back while the request runs, which workers need not hear of."""
    with engine(write_windowed(tmp_path), fusion={**LOSSY, "reuse": "auto"}) as served:
        assert served.side.report().data["no_reuse"] == "kv_cache_groups"
        for prompt in near_prefix(3, shared=8 * WINDOW):
            served.submit(prompt, WINDOW)
            served.step()
        served.finish()
        assert len(served.side.tables.groups) > 1, "the model has windows"
        assert served.statistics["blocks_merged"] > 0 and served.statistics["reuse_plan_seconds"] == 0
        assert served.side.recovery.cause is None
        served.assert_drained()
