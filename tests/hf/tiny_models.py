"""Tiny random models built from a config, and helpers that run them with either cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.policy import FusionPolicy

VOCABULARY = 97
BLOCK = 4
EXACT = FusionPolicy(max_relative_error=0.0)
"""Fuses what is bit-equal only, so answers must not change at all."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough that the next token depends on what the cache holds.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = {"sliding_window": 9, "num_hidden_layers": 4, "head_dim": 8}
MIXED["layer_types"] = ["sliding_attention", "full_attention"] * 2
PER_LAYER_INPUT = {**MIXED, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
GEMMA3N = {**PER_LAYER_INPUT, "num_kv_shared_layers": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
LATENT = {
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "first_k_dense_replace": 3,
    "num_key_value_heads": 4,
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaConfig", {}),
    "qwen2": ("Qwen2", "Qwen2Config", {}),
    "mistral": ("Mistral", "MistralConfig", {"sliding_window": None}),
    "gemma": ("Gemma", "GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2", "Gemma2Config", MIXED),
    "gemma3": ("Gemma3", "Gemma3TextConfig", MIXED),
    "gemma3n": ("Gemma3n", "Gemma3nTextConfig", GEMMA3N),
    "gemma4": ("Gemma4", "Gemma4TextConfig", {**PER_LAYER_INPUT, "num_kv_shared_layers": 0}),
    "gpt2": ("GPT2LMHead", "GPT2Config", GPT2),
    "neox_japanese": ("GPTNeoXJapanese", "GPTNeoXJapaneseConfig", {"intermediate_multiple_size": 2}),
    "mistral_sliding": ("Mistral", "MistralConfig", {"sliding_window": 8}),
    "deepseek_v3": ("DeepseekV3", "DeepseekV3Config", LATENT),
    "diffllama": ("DiffLlama", "DiffLlamaConfig", {}),
    "jetmoe": ("JetMoe", "JetMoeConfig", {"kv_channels": 8, "num_local_experts": 4}),
    "modernbert_decoder": ("ModernBertDecoder", "ModernBertDecoderConfig", MIXED),
}


def build_model(
    name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A model of `MODELS` with random weights that depend on `seed` only."""
    model_name, config_name, fields = MODELS[name]
    suffix = "Model" if model_name.endswith("LMHead") else "ForCausalLM"
    model_class = getattr(transformers, model_name + suffix)
    config = getattr(transformers, config_name)(**{**COMMON, **fields, **changes})
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def build_t5() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def build_mamba() -> PreTrainedModel:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).eval()


def build_rwkv() -> PreTrainedModel:
    config = transformers.RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, context_length=64)
    return transformers.RwkvForCausalLM(config).eval()


def prompts(*lengths: int, seed: int = 1, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Random prompts of the given lengths, left-padded with token 0: ids and mask `[rows, longest]`."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) if width is None else width
    ids = torch.randint(2, VOCABULARY, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def duplicates(rows: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The same random prompt in every row."""
    ids, mask = prompts(length, seed=seed)
    return ids.repeat(rows, 1), mask.repeat(rows, 1)


def stock_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def generate(
    model: PreTrainedModel, prompt: tuple[Tensor, Tensor], cache: Any, tokens: int = 12, **options: Any
) -> Any:
    """Greedy generation with logits; `options` go to `generate`."""
    return model.generate(
        input_ids=prompt[0],
        attention_mask=prompt[1],
        past_key_values=cache,
        max_new_tokens=tokens,
        **{"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options},
    )


def assert_same_output(expected: Any, actual: Any) -> None:
    """Same tokens, and logits equal to the last bit."""
    assert torch.equal(expected.sequences, actual.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@torch.no_grad()
def step(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """One forward pass; returns the logits. With a `JointCache`, integrity is checked."""
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, **inputs).logits
    if isinstance(cache, JointCache):
        cache.check_integrity()
    return logits


@torch.no_grad()
def feed(cache: JointCache, keys: Tensor, values: Tensor) -> None:
    """Store synthetic states `[layers, rows, h, n, d]` as a forward pass would, then fuse."""
    for layer, key, value in zip(cache.layers, keys, values, strict=True):
        layer.update(key, value)
    cache.end_step()
    cache.check_integrity()


def read_block(cache: JointCache, layer: int, row: int, slot: int) -> tuple[Tensor, Tensor]:
    """K and V that paged layer `layer` reads for one block, scales applied: float32 `[t, h, d]`."""
    group, member = divmod(layer, cache.pool.groups.layers)
    table, kv = cache.tables[group], cache.pool.blocks.kv
    ref = table.ref(row, slot, member)
    return kv.keys[member][ref.page].float() * ref.k_scale, kv.values[member][ref.page].float() * ref.v_scale


def block_errors(cache: JointCache, keys: Tensor, values: Tensor, row: int, slot: int) -> tuple[Tensor, Tensor]:
    """Relative errors of one block in each layer, against the unfused `[layers, rows, h, n, d]`."""
    start = int(cache.padding[row]) + slot * cache.pool.block_size
    errors: tuple[list[Tensor], list[Tensor]] = ([], [])
    for layer in range(len(keys)):
        for side, states in enumerate((keys, values)):
            true = states[layer, row, :, start : start + cache.pool.block_size].transpose(0, 1).float()
            read = read_block(cache, layer, row, slot)[side]
            errors[side].append((true - read).norm() / true.norm())
    return torch.stack(errors[0]), torch.stack(errors[1])


def joint(
    name: str,
    policy: FusionPolicy | str = "off",
    block_size: int = BLOCK,
    max_pages: int | None = None,
    **build: Any,
) -> tuple[PreTrainedModel, JointPool]:
    """A fresh model and a pool for it."""
    model = build_model(name, **build)
    return model, JointPool(model, policy, block_size=block_size, max_pages=max_pages)
