"""Attention that reads shared pages once, in a real engine: vLLM's answers up to rounding, or vLLM's own attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("vllm")

from vllm.v1.attention import selector
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from jointkv.errors import LayoutError
from jointkv.vllm_plugin.attention.backend import JointAttention
from jointkv.vllm_plugin.attention.install import changed
from tests.vllm_plugin.engines import EXACT, LOSSY, Engine, engine, near_prefix, text

OUT = 24
PROMPTS = [text(300, number // 4) for number in range(12)] + [text(length, length) for length in (1, 31, 32, 33, 700)]
CHUNKED = {"max_num_batched_tokens": 256, "enable_chunked_prefill": True}


def serve(served: Engine, prompts: list[list[int]] = PROMPTS) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of every prompt."""
    names = [served.submit(prompt, OUT, logprobs=0) for prompt in prompts]
    served.finish()
    served.assert_drained()
    return [(served.outputs[name], served.logprobs[name]) for name in names]


@pytest.fixture(scope="module")
def expected(calm: Path) -> list[list[int]]:
    """Tokens with vLLM's own attention."""
    with engine(calm, fusion=EXACT) as own:
        return [tokens for tokens, _ in serve(own)]


def reading(served: Engine) -> Any:
    """The part of the plugin that stands between vLLM's attention layers and ours."""
    layers = served.core.vllm_config.compilation_config.static_forward_context.values()
    return next(iter(layers)).impl.reading


@pytest.mark.parametrize(("caching", "block_size"), [(True, 64), (False, 32)])
def test_the_same_answers_as_with_vllms_attention(calm: Path, caching: bool, block_size: int) -> None:
    options = {**CHUNKED, "enable_prefix_caching": caching, "block_size": block_size, "pages": 400}
    with engine(calm, fusion=EXACT, **options) as own:
        expected = serve(own)
    with engine(calm, fusion={**EXACT, "attention": "shared"}, **options) as shared:
        found = serve(shared)
        assert shared.statistics["blocks_merged"] > 0 or caching
        assert reading(shared).fault is None and reading(shared).shared_steps == reading(shared).steps > OUT
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(found, expected, strict=True):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-3)


@pytest.mark.hazard(
    "State",
    "attention reads shared pages once while requests are merged, preempted, resumed and hit prefixes",
    "every step is computed, page counts and tables stay right",
)
def test_lossy_merges_preemption_and_prefix_hits_at_a_full_pool(calm: Path) -> None:
    prompts = near_prefix(8, shared=320)
    with engine(calm, pages=60, fusion={**LOSSY, "attention": "shared"}, **CHUNKED) as shared:
        serve(shared, prompts + PROMPTS)
        serve(shared, prompts)
        assert shared.statistics["faults"] == 0 and shared.statistics["blocks_merged"] > 0 and shared.preempted > 0
        assert reading(shared).fault is None and reading(shared).shared_steps == reading(shared).steps


def test_layer_groups_have_work_of_their_own(calm: Path, expected: list[list[int]]) -> None:
    with engine(calm, pages=400, fusion={**EXACT, "layer_groups": 2, "attention": "shared"}) as shared:
        assert [tokens for tokens, _ in serve(shared)] == expected
        assert len(shared.runner.kv_cache_config.kv_cache_groups) == 2 and reading(shared).fault is None


def test_measured_at_start_and_used_where_it_pays(calm: Path) -> None:
    with engine(calm, fusion={**EXACT, "attention": "auto"}) as measured:
        switch = reading(measured).switch
        assert min(sum(switch.engine), sum(switch.shared)) > 0
        serve(measured)
        assert reading(measured).fault is None


@pytest.mark.hazard(
    "Faults",
    "attention that reads shared pages once fails in the middle of a step",
    "that step and all later ones are computed by vLLM's own attention; no token differs",
)
@pytest.mark.parametrize("broken", ["reading.group_pages", "cpu.JointCPUAttention.kernel"])
def test_after_an_error_attention_is_vllms(calm: Path, expected: list[list[int]], broken: str) -> None:
    with engine(calm, fusion={**EXACT, "attention": "shared"}) as shared:
        first = shared.submit(PROMPTS[0], OUT)
        for _ in range(5):
            shared.step()
        with patch(f"jointkv.vllm_plugin.attention.{broken}", side_effect=RuntimeError("planted")) as planted:
            assert [tokens for tokens, _ in serve(shared)] == expected
            assert planted.call_count == 1
        assert shared.outputs[first] == expected[0]
        assert "planted" in reading(shared).fault and shared.statistics["faults"] == 0


@pytest.mark.hazard(
    "Compatibility",
    "pages lie in an order that attention over shared pages was not written for",
    "vLLM's own attention is used, and one line in the log says why",
)
def test_pages_that_are_not_as_believed_are_left_to_vllm(calm: Path) -> None:
    with (
        patch("jointkv.attention.layouts.LayerPages.confirm", side_effect=LayoutError("never seen")),
        engine(calm, fusion={**EXACT, "attention": "shared"}) as refused,
    ):
        assert refused.connector.scheduler.state != "disabled"
        serve(refused, PROMPTS[:2])
        impl = next(iter(refused.core.vllm_config.compilation_config.static_forward_context.values())).impl
        assert isinstance(impl, JointAttention) and not hasattr(impl, "reading")


def test_another_interface_of_vllms_attention_leaves_it_to_vllm(calm: Path) -> None:
    with (
        patch(
            "jointkv.vllm_plugin.attention.install.differences", return_value=["CPUAttentionBackendImpl has no scale"]
        ),
        engine(calm, fusion={**EXACT, "attention": "shared"}) as other,
    ):
        serve(other, PROMPTS[:2])
        layers = other.core.vllm_config.compilation_config.static_forward_context.values()
        assert {type(layer.impl) for layer in layers} == {CPUAttentionBackendImpl}


def test_the_installed_attention_is_the_one_written_for() -> None:
    assert changed("cpu") == changed("gpu") == []


def test_other_engines_of_the_process_are_left_alone(calm: Path) -> None:
    with engine(calm, fusion={**EXACT, "attention": "shared"}) as shared:
        serve(shared, PROMPTS[:2])
        assert (
            not AttentionBackendEnum.CPU_ATTN.is_overridden() and not selector._cached_get_attn_backend.cache_info()[3]
        )
    with engine(calm) as stock:
        layers = stock.core.vllm_config.compilation_config.static_forward_context.values()
        assert {type(layer.impl) for layer in layers} == {CPUAttentionBackendImpl}
