"""Reuse before compute beside what else requests ask of vLLM: adapters, grammars, several answers, log-probabilities.

One engine serves all tests. What it answers is compared with what it answers to requests that opted out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from tests.cli.commands import save_tiny
from tests.vllm_plugin.engines import LOSSY, Engine, Prompt, engine, near_prefix, write_model

PROBED = {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}
REUSED = 20 * 32
PROMPTS = near_prefix(3)
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}

pytestmark = pytest.mark.usefixtures("bold")


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """A random adapter of what reads and writes attention."""
    config, rank = LlamaConfig.from_pretrained(model), 4
    width, generator = config.num_attention_heads * config.head_dim, torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config.num_hidden_layers):
        for name, out in (("q_proj", width), ("v_proj", config.num_key_value_heads * config.head_dim)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(rank, config.hidden_size, generator=generator)
            weights[f"{at}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A different first line changes K and V of what follows next to nothing; it has a tokenizer."""
    folder = tmp_path_factory.mktemp("serene")
    save_tiny(folder)
    return write_model(folder, context=0.005)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        LoRARequest(name, number, str(write_adapter(folder / name, model, number)))
        for number, name in enumerate(("red", "blue"), 1)
    ]


@pytest.fixture(scope="module")
def reusing(model: Path) -> Iterator[Engine]:
    options: dict[str, Any] = {
        "skip_tokenizer_init": False,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "enable_lora": True,
        "max_loras": 2,
        "max_lora_rank": 8,
    }
    with engine(model, 200, PROBED, **options) as served:
        yield served


@pytest.fixture
def served(reusing: Engine) -> Iterator[Engine]:
    """With nothing resident."""
    assert reusing.llm.reset_prefix_cache()
    yield reusing
    assert reusing.statistics["faults"] == 0
    reusing.assert_drained()


def answer(
    served: Engine, prompt: Prompt, adapter: LoRARequest | None = None, reuse: bool = True, **options: Any
) -> tuple[Any, int]:
    """What vLLM says to one request, and how many tokens of its prompt were reused."""
    before = served.statistics["prompt_tokens_skipped"]
    params = SamplingParams(
        **{"max_tokens": 8, "temperature": 0, "ignore_eos": True, **options},
        extra_args=None if reuse else {"jointkv": False},
    )
    (output,) = served.llm.generate({"prompt_token_ids": prompt}, params, lora_request=adapter, use_tqdm=False)
    return output, served.statistics["prompt_tokens_skipped"] - before


def alone_and_reusing(served: Engine, adapter: LoRARequest | None = None, **options: Any) -> tuple[Any, Any]:
    """The answers to one prompt where it is computed and where it is reused behind another one's header."""
    alone, _ = answer(served, PROMPTS[1], adapter, reuse=False, **options)
    served.llm.reset_prefix_cache()
    answer(served, PROMPTS[0], adapter)
    reusing, reused = answer(served, PROMPTS[1], adapter, **options)
    assert reused == REUSED * options.get("n", 1)
    return alone, reusing


def test_an_adapter_reuses_its_own_pages_alone(served: Engine, adapters: list[LoRARequest]) -> None:
    red, blue = adapters
    for writer, others in ((None, (red, blue)), (red, (None, blue))):
        served.llm.reset_prefix_cache()
        alone, reusing = alone_and_reusing(served, writer)
        assert reusing.outputs[0].token_ids == alone.outputs[0].token_ids
        for other in others:
            assert answer(served, PROMPTS[2], other)[1] == 0


def test_a_grammar_holds_behind_reused_text(served: Engine) -> None:
    grammar = {"structured_outputs": StructuredOutputsParams(json=SCHEMA), "ignore_eos": False, "max_tokens": 60}
    alone, reusing = alone_and_reusing(served, **grammar)
    assert reusing.outputs[0].text == alone.outputs[0].text
    assert set(json.loads(reusing.outputs[0].text)) == {"age", "kind"}


def test_each_of_several_answers_reuses(served: Engine) -> None:
    alone, reusing = alone_and_reusing(served, n=3, temperature=0.7, seed=5)
    assert [one.token_ids for one in reusing.outputs] == [one.token_ids for one in alone.outputs]
    assert len({tuple(one.token_ids) for one in reusing.outputs}) > 1


def test_log_probabilities_behind_reused_text(served: Engine) -> None:
    alone, reusing = alone_and_reusing(served, logprobs=3)
    for mine, theirs in zip(reusing.outputs[0].logprobs, alone.outputs[0].logprobs, strict=True):
        assert mine.keys() == theirs.keys()
        assert max(abs(mine[token].logprob - theirs[token].logprob) for token in mine) < 0.01


@pytest.mark.parametrize("way", ["reset", "sleep"])
def test_what_was_resident_before_is_reused_no_more(way: str, served: Engine) -> None:
    answer(served, PROMPTS[0])
    assert answer(served, PROMPTS[1])[1] == REUSED
    if way == "reset":
        assert served.llm.reset_prefix_cache()
    else:
        served.llm.sleep(level=1)
        served.llm.wake_up()
    assert answer(served, PROMPTS[2])[1] == 0
    assert answer(served, PROMPTS[1])[1] == REUSED
