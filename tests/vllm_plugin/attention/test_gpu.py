"""Attention for GPUs that reads shared pages once, without a GPU: the kernels run in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import triton_attn
from vllm.v1.kv_cache_interface import KVCacheLayout

from jointkv.attention.layouts import LayerPages
from jointkv.errors import IntegrityError, LayoutError
from jointkv.vllm_plugin.attention import reading as shared_reading
from jointkv.vllm_plugin.attention.gpu import JointGPUAttention, JointGPUBackend
from jointkv.vllm_plugin.engine.runners.base import Remap
from jointkv.vllm_plugin.messages import Inquiry
from tests.vllm_plugin.attention.gpu_layers import (
    HEADS,
    KV_HEADS,
    LAYERS,
    LENGTHS,
    PAGES,
    SIZE,
    TOKENS,
    Group,
    close,
    layer_of,
    query_of,
    told,
)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a GPU, vLLM has switched its own kernels off in this process; see `interpreted_engine.py` for them."""

    def write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *_: Any) -> None:
        page, token = slots // keys.shape[1], slots % keys.shape[1]
        keys[page, token], values[page, token] = key, value

    monkeypatch.setattr(triton_attn, "triton_reshape_and_cache_flash", write)
    with told():
        yield


@pytest.mark.parametrize("own_norms", [False, True])
@pytest.mark.parametrize("order", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC], ids=lambda order: order.name)
def test_the_answer_is_the_definitions_in_both_orders_of_pages(order: KVCacheLayout, own_norms: bool) -> None:
    with torch.inference_mode():
        group = Group([layer_of(order) for _ in range(LAYERS)], own_norms)
        factors = group.give_factors() if own_norms else None
        metadata, query = group.metadata(), query_of(group)
        assert metadata.work.num_pages == 9 and (len(metadata.work.pages.page) < sum(-(-n // TOKENS) for n in LENGTHS))
        for place in range(LAYERS):
            truth = group.expected(place, query, None if factors is None else factors[:, place])
            close(group.forward(place, query, metadata), truth)
    assert group.reading.fault is None and group.reading.shared_steps == 1


def test_decoding_goes_on_with_the_same_work_and_factors_are_looked_at_once() -> None:
    """On a GPU every look at factors waits for it."""
    with torch.inference_mode():
        group = Group([layer_of() for _ in range(LAYERS)], own_norms=True)
        factors, works = group.give_factors(), set()
        group.asked.fill_(1)
        group.lengths.copy_(torch.tensor([40, 60, 33, 30]))
        with patch("jointkv.attention.gpu.check_scale") as looks:
            for _ in range(3):
                metadata, query = group.metadata(), query_of(group)
                works.add(id(metadata.work))
                for place in range(LAYERS):
                    close(group.forward(place, query, metadata), group.expected(place, query, factors[:, place]))
                group.lengths += 1
            assert len(works) == 1 and looks.call_count == 2 * LAYERS
            group.norms.propose(Inquiry(2, [], *np.array([[0], [9], [1]])), torch.full((1, LAYERS, 2), 1.25))
            group.norms.commit([Remap("request 2", 0, 0, page=1, own=9, step=2)])
            factors[:, :, 2, 0] = 1.25
            metadata, query = group.metadata(), query_of(group)
            close(group.forward(1, query, metadata), group.expected(1, query, factors[:, 1]))
            assert looks.call_count == 2 * LAYERS + 2


@pytest.mark.parametrize("own_norms", [False, True])
def test_an_error_in_the_kernel_leaves_attention_to_vllm(own_norms: bool) -> None:
    """But for steps with factors, which are computed by definition."""
    group = Group([layer_of() for _ in range(LAYERS)], own_norms)
    factors = group.give_factors() if own_norms else None
    metadata, query = group.metadata(), query_of(group)
    stock = torch.full((len(query) + 3, HEADS, SIZE), 3.0)
    with (
        patch.object(JointGPUAttention, "kernel", side_effect=RuntimeError("planted")) as planted,
        patch.object(triton_attn.TritonAttentionImpl, "forward", return_value=stock) as vllms,
        patch.object(shared_reading.logger, "error") as said,
    ):
        for _ in range(2):
            for place, layer in enumerate(group.layers):
                if factors is not None:
                    close(group.forward(place, query, metadata), group.expected(place, query, factors[:, place]))
                else:
                    assert layer.impl.forward(layer, query, None, None, None, metadata, output=None) is stock
            metadata = group.metadata()
            assert metadata.work is None
    assert planted.call_count == 1 and vllms.call_count == (0 if own_norms else 2 * LAYERS)
    assert said.call_count == 1 and "planted" in said.call_args.args[1]
    assert group.norms is None or not group.norms.enabled


@pytest.mark.parametrize("rows", [["request 0"], [f"request {row}" for row in range(9)], []])
def test_a_step_that_is_not_the_batchs_is_vllms_unless_blocks_have_factors(rows: list[str]) -> None:
    """A warm-up, for one."""
    group = Group([layer_of() for _ in range(LAYERS)], own_norms=True)
    group.batch.req_ids = rows
    metadata = group.metadata()
    assert metadata.work is None and metadata.factors is None and group.reading.steps == 0
    group.give_factors()
    with pytest.raises(IntegrityError, match="norms"):
        group.metadata()


REFUSED: dict[str, dict[str, Any]] = {
    "sliding window": {"sliding_window": 8},
    "ALiBi": {"alibi_slopes": [0.5] * HEADS},
    "soft cap": {"logits_soft_cap": 30.0},
    "sinks": {"sinks": torch.zeros(HEADS)},
    "fp8": {"kv_cache_dtype": "fp8"},
    "quantized": {"kv_cache_dtype": "int8_per_token_head"},
    "local attention": {"chunk_lookback": 2},
    "not causal": {"attn_type": AttentionType.ENCODER_DECODER},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_were_not_written_for_is_refused(name: str) -> None:
    layer = layer_of(**REFUSED[name])
    with pytest.raises(LayoutError, match=name):
        Group([layer])
    assert not hasattr(layer.impl, "reading")


def test_layers_and_batches_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(LayoutError, match="numbers of heads"):
        Group([layer_of(), layer_of(num_heads=8)])
    with pytest.raises(LayoutError, match="cut in two"):
        Group([layer_of()], ubatches=True)


def test_pages_that_are_not_as_believed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    images = layer_of()
    images.use_mm_prefix = True
    with pytest.raises(LayoutError, match="images"):
        Group([images])
    halves = layer_of()
    halves.dtype = torch.float16
    with pytest.raises(LayoutError, match="another dtype"):
        Group([halves])
    wider = layer_of()
    wider.kv_cache = torch.zeros(PAGES, KV_HEADS, TOKENS, 2 * SIZE + 16)
    with pytest.raises(LayoutError, match="never seen"):
        Group([wider])
    monkeypatch.setattr(
        triton_attn, "triton_reshape_and_cache_flash", lambda key, value, keys, *_: keys[1].copy_(key.flip(0))
    )
    with pytest.raises(LayoutError, match="never seen"):
        Group([layer_of()])


def test_a_wrong_answer_at_the_start_is_seen() -> None:
    def wrong(query: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (query,)

    with (
        patch.object(JointGPUAttention, "kernel", staticmethod(wrong)),
        pytest.raises(LayoutError, match="wrong answer"),
    ):
        Group([layer_of()])


def test_pages_of_every_order_that_it_asks_for_are_one_piece() -> None:
    for order in JointGPUBackend.supported_kv_cache_layouts():
        assert layer_of(order).kv_cache[0].is_contiguous()


def test_a_layer_of_another_backend_is_not_touched() -> None:
    layer = layer_of()
    layer.impl = triton_attn.TritonAttentionImpl(HEADS, SIZE, 0.2, KV_HEADS, None, None, "auto")
    with pytest.raises(LayoutError, match="not the attention of this plugin"):
        Group([layer])


@pytest.mark.slow
def test_a_real_engine_with_vllms_triton_kernels(tmp_path: Path) -> None:
    """The engine of a CPU does as if it had a GPU: every kernel is interpreted, the rest is as it would be."""
    script = Path(__file__).with_name("interpreted_engine.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    cases = {case.pop("case"): case for case in said}
    assert len(cases) == 5, done.stderr[-4000:]
    assert cases["stock"]["attention"] == "TritonAttentionImpl"
    for name in ("shared", "broken", "norms", "norms broken"):
        case = cases[name]
        assert case["attention"] == "JointGPUAttention" and case["merged"] > 0 and case["faults"] == 0
        assert case["shared_steps"] == case["steps"] > 4
        assert case["fault"] == ("RuntimeError: planted" if "broken" in name else None)
        assert (case["factors"] > 0) == ("norms" in name)
        assert case["tokens"] == cases["norms" if "norms" in name else "stock"]["tokens"]


def test_layer_pages_are_views_of_the_engines_cache() -> None:
    layer = layer_of(KVCacheLayout.LBNHC, torch.bfloat16)
    pages = layer.impl.layout(layer)
    assert isinstance(pages, LayerPages) and pages.order == "rows" and pages.block_size == TOKENS
    assert pages.keys.data_ptr() == layer.kv_cache.data_ptr()
    assert layer.impl.threads(pages) is None
