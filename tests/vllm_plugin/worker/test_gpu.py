"""The worker for GPUs lets vLLM choose attention that reads shared pages once, without a GPU."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

import torch
from vllm.config import AttentionConfig, CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import _ATTN_OVERRIDES, AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from jointkv.errors import UnsupportedEngine
from jointkv.vllm_plugin import CONNECTOR, CONNECTOR_MODULE
from jointkv.vllm_plugin.attention.gpu import JointGPUAttention, JointGPUBackend, JointGPUBuilder
from jointkv.vllm_plugin.attention.install import override
from jointkv.vllm_plugin.worker.gpu import JointGPUWorker


def test_registration_leaves_the_registry_as_it_was() -> None:
    custom = AttentionBackendEnum.CUSTOM
    for before in ({}, {custom: "a.plugin.Backend"}):
        with patch.dict(_ATTN_OVERRIDES, before):
            known = dict(_ATTN_OVERRIDES)
            with pytest.raises(RuntimeError, match="planted"), override("CUSTOM", JointGPUBackend):
                assert custom.get_class() is JointGPUBackend
                raise RuntimeError("planted")
            assert known == _ATTN_OVERRIDES and selector._cached_get_attn_backend.cache_info().currsize == 0


def engine_config(
    backends: dict[str, str] | None = None, head_size: int = 64, pages: str = "auto", **options: Any
) -> Any:
    names = {"kv_connector": CONNECTOR, "kv_connector_module_path": CONNECTOR_MODULE}
    transfer = SimpleNamespace(**names, kv_connector_extra_config=options)
    return SimpleNamespace(
        attention_config=AttentionConfig(backend_per_kind=backends or {}),
        kv_transfer_config=transfer,
        model_config=SimpleNamespace(get_head_size=lambda: head_size),
        cache_config=SimpleNamespace(cache_dtype=pages),
    )


def backends_while_loading(config: Any) -> dict[str, str | None]:
    """What the GPU worker has vLLM's model loader see: backends by kind of layer, and what CUSTOM stands for."""
    seen: dict[str, str | None] = {}

    def load(self: Worker) -> None:
        seen.update({kind: backend.name for kind, backend in config.attention_config.backend_per_kind.items()})
        custom = AttentionBackendEnum.CUSTOM
        seen["CUSTOM"] = custom.get_path() if custom.is_overridden() else None

    worker = object.__new__(JointGPUWorker)
    worker.vllm_config = config
    with patch.object(Worker, "load_model", load):
        worker.load_model()
    assert not AttentionBackendEnum.CUSTOM.is_overridden()
    return seen


def test_the_gpu_worker_loads_its_model_with_it_where_that_is_asked_for() -> None:
    ours = f"{JointGPUBackend.__module__}.{JointGPUBackend.__qualname__}"
    for options in ({"attention": "shared"}, {"own_norms": True}, {"own_norms": True, "attention": "auto"}):
        assert backends_while_loading(engine_config(**options)) == {"full_attention": "CUSTOM", "CUSTOM": ours}
    assert backends_while_loading(engine_config()) == {"CUSTOM": None}
    assert backends_while_loading(engine_config(attention="shared", enabled=False)) == {"CUSTOM": None}
    assert backends_while_loading(engine_config(attention="auto", enabled=False)) == {"CUSTOM": None}
    users = {"full_attention": "FLASH_ATTN", "sliding_window": "TRITON_ATTN"}
    assert backends_while_loading(engine_config(users, attention="shared")) == {**users, "CUSTOM": ours}


def test_another_interface_of_vllms_attention_leaves_it_to_vllm() -> None:
    with patch("jointkv.vllm_plugin.attention.install.differences", return_value=["TritonAttentionImpl has no scale"]):
        assert backends_while_loading(engine_config(attention="shared")) == {"CUSTOM": None}


@pytest.mark.parametrize("config", [{"pages": "fp8"}, {"pages": "nvfp4"}, {"head_size": 16}, {"head_size": 512}])
def test_what_is_known_not_to_work_is_left_to_vllm_before_the_model_is_loaded(config: dict[str, Any]) -> None:
    assert backends_while_loading(engine_config(attention="shared", **config)) == {"CUSTOM": None}


def test_a_measurement_on_a_gpu_is_refused_at_the_start() -> None:
    with pytest.raises(UnsupportedEngine, match="attention=shared or attention=engine"):
        backends_while_loading(engine_config(attention="auto"))


def test_vllms_selection_for_gpus_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("compiled for CUDA"))
    from vllm.platforms.cuda import CudaPlatformBase

    monkeypatch.setattr(CudaPlatformBase, "get_device_capability", lambda *_: DeviceCapability(9, 0))
    asked = selector.AttentionSelectorConfig(128, torch.bfloat16, "auto", 16, use_kv_connector=True)
    with override("CUSTOM", JointGPUBackend):
        path = CudaPlatformBase.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, asked)
    assert path == f"{JointGPUBackend.__module__}.{JointGPUBackend.__qualname__}"
    assert JointGPUBackend.get_impl_cls() is JointGPUAttention and JointGPUBackend.get_builder_cls() is JointGPUBuilder


@pytest.mark.parametrize(
    ("mode", "graphs"), [(CompilationMode.VLLM_COMPILE, "PIECEWISE"), (CompilationMode.NONE, "NONE")]
)
def test_no_cuda_graph_holds_attention(mode: CompilationMode, graphs: str) -> None:
    support = JointGPUBuilder.get_cudagraph_support(None, None)
    for asked, refused in (("FULL_AND_PIECEWISE", False), ("FULL_DECODE_ONLY", False), ("FULL", True)):
        config = CompilationConfig(mode=mode, cudagraph_mode=CUDAGraphMode[asked])
        if mode == CompilationMode.VLLM_COMPILE:
            config.set_splitting_ops_for_v1(all2all_backend="none")
        with pytest.raises(ValueError, match="PIECEWISE") if refused else nullcontext():
            assert config.resolve_cudagraph_mode_and_sizes(support, "ours") == CUDAGraphMode[graphs]
