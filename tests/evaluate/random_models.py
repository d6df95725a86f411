"""A random model for a toy tokenizer, whose answers depend on all that it reads."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jointkv.evaluate.traffic import Tokenizer


def random_llama(tokenizer: Tokenizer, layers: int) -> LlamaForCausalLM:
    """Always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()
