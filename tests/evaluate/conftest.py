"""What tests of several rooms run on."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.evaluate.sharing_requests import VOCABULARY


@pytest.fixture(scope="module")
def model():
    """A random Llama in which what was read before changes K and V a little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    )
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.0 if "embed" in name else weight.shape[1] ** -0.5)
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(0.1)
    return built
