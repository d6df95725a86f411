"""A tiny random model and requests for it, which every environment of the methods can build."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.traffic.base import Request

BLOCK = 4
LAYERS, HEADS, SIZE = 6, 2, 8
VOCABULARY = 97
PER_TOKEN = 2 * LAYERS * HEADS * SIZE
"""Numbers of K and V per token."""
PAGE_BYTES = BLOCK * PER_TOKEN * 4

needs_hf = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.16"), reason="jointkv.hf needs a later transformers"
)


def build_model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 4 * SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 512,
        # Large enough that the next token depends on what the cache holds.
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


def random_tokens(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, VOCABULARY, (count,), generator=generator).tolist())


def requests_of(*prompts: tuple[int, ...], continuation: int = 6) -> list[Request]:
    return [Request(prompt, random_tokens(continuation, 100 + i), "") for i, prompt in enumerate(prompts)]


def same_start(rows: int = 3, shared: int = 70) -> list[Request]:
    """Prompts that share their first `shared` tokens and end in 3, 4, ... tokens of their own."""
    start = random_tokens(shared, 1)
    return requests_of(*(start + random_tokens(3 + row, 10 + row) for row in range(rows)))


def different(rows: int = 3, length: int = 72) -> list[Request]:
    return requests_of(*(random_tokens(length + row, 50 + row) for row in range(rows)))


def batch_of(requests: list[Request], **changes: Any) -> Batch:
    return Batch(build_model(**changes), requests, BLOCK)
