"""Engines without a store, each with the cause named, and what tells models apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from transformers import LlamaConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

from jointkv.errors import UnsupportedEngine
from jointkv.vllm_plugin.engine.stored import check_store, stored_model

SIZES = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = FullAttentionSpec(**SIZES)


def config(
    workers: int = 1,
    cached: bool = True,
    role: str = "kv_both",
    policy: str = "recompute",
    adapters: bool = False,
    device: str = "cpu",
) -> Any:
    return SimpleNamespace(
        lora_config=SimpleNamespace() if adapters else None,
        device_config=SimpleNamespace(device_type=device),
        parallel_config=SimpleNamespace(world_size=workers),
        cache_config=SimpleNamespace(enable_prefix_caching=cached),
        kv_transfer_config=SimpleNamespace(kv_role=role, kv_load_failure_policy=policy),
    )


def pages(*specs: Any) -> Any:
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=["one", "two"]) for spec in specs or (FULL,)]
    return SimpleNamespace(kv_cache_groups=groups)


def test_the_usual_engine_may_have_one() -> None:
    check_store(config(), pages(), ours=True)
    check_store(config(adapters=True, device="cuda"), pages(), ours=True)


@pytest.mark.parametrize(
    ("changed", "specs", "ours", "cause"),
    [
        ({"workers": 2}, (), True, "2 workers.*--data-parallel-size"),
        ({}, (FULL, FULL), True, "2 KV-cache groups"),
        ({}, (SlidingWindowSpec(**SIZES, sliding_window=64),), True, "layers of kind SlidingWindowSpec"),
        ({}, (MLAAttentionSpec(**SIZES),), True, "layers of kind MLAAttentionSpec"),
        ({}, (FullAttentionSpec(**{**SIZES, "dtype": torch.uint8}),), True, "uint8.*drop --kv-cache-dtype"),
        ({"cached": False}, (), True, "prefix caching"),
        ({"adapters": True}, (), True, "adapters on a CPU.*drop --enable-lora"),
        ({}, (), False, "vLLM's own scheduler.*jointkv serve"),
        ({"role": "kv_producer"}, (), True, "kv_role=kv_producer"),
        ({"policy": "fail"}, (), True, "requests fail whose pages are lost"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], specs: tuple[Any, ...], ours: bool, cause: str) -> None:
    with pytest.raises(UnsupportedEngine, match=cause):
        check_store(config(**changed), pages(*specs), ours)


def test_models_are_told_apart(calm: Path, lively: Path, tmp_path: Path) -> None:
    def named(folder: Path, spec: Any = FULL, dtype: torch.dtype = torch.float32, **changes: Any) -> str:
        model = SimpleNamespace(
            model=str(folder), revision=None, dtype=dtype, quantization=None, hf_config=LlamaConfig(**changes)
        )
        return stored_model(SimpleNamespace(model_config=model), pages(spec))

    first = named(calm)
    assert first == named(calm, name_or_path="elsewhere")
    others = [
        named(lively),
        named(calm, FullAttentionSpec(**{**SIZES, "block_size": 64})),
        named(calm, dtype=torch.bfloat16),
        named(calm, rope_theta=1e6),
    ]
    assert len({first, *others}) == 5
    with pytest.raises(UnsupportedEngine, match="cannot tell the weights"):
        named(tmp_path)
