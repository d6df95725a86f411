"""What a prefill computes: tokens and floating-point operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Work:
    """The prefill of a batch, and what of it was read from resident pages instead of being computed.

    Attributes:
        tokens: of all prompts.
        exact_tokens: read where everything before is equal too, as a prefix cache does.
        skipped_tokens: read although something before them differs.
        flops, flops_unfused: of what was computed, and of everything; see `prefill_flops`.
        reused_blocks, missed_blocks: those behind `skipped_tokens`, and those of them beyond the error bounds, measured
            against the K and V of an exact prefill.
    """

    tokens: int
    exact_tokens: int
    skipped_tokens: int
    flops: int
    flops_unfused: int
    reused_blocks: int
    missed_blocks: int

    def __add__(self, other: Work) -> Work:
        """The prefill of both batches."""
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def skipped_share(self) -> float:
        """Share of the tokens that were skipped although something before them differs."""
        return self.skipped_tokens / self.tokens

    @property
    def computed_share(self) -> float:
        """Floating-point operations over those of computing everything."""
        return self.flops / self.flops_unfused

    @property
    def missed_share(self) -> float | None:
        """Share of the reused blocks that are beyond the bounds; None where none was reused."""
        return self.missed_blocks / self.reused_blocks if self.reused_blocks else None


def prefill_flops(model: PreTrainedModel, computed: Sequence[Tensor]) -> int:
    """Floating-point operations of computing tokens of several prompts.

    `2 P + 4 L a (p + 1)` for a token at position `p`: each of the `P` weights outside the embeddings multiplies and
    adds once (of a mixture of experts all are counted), and in each of `L` layers a query of `a` numbers, all heads
    together, meets `p + 1` keys and as many values. Output layer, norms and comparisons of blocks are left out.

    Args:
        computed: by prompt, which positions, bool `[tokens]`.
    """
    config = model.config.get_text_config(decoder=True)
    embeddings = {id(weight) for weight in model.get_input_embeddings().parameters()}
    output = model.get_output_embeddings()
    embeddings |= set() if output is None else {id(weight) for weight in output.parameters()}
    weights = sum(weight.numel() for weight in model.parameters() if id(weight) not in embeddings)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    positions = [chosen.nonzero().squeeze(1) for chosen in computed]
    tokens = sum(len(place) for place in positions)
    met = sum(int((place + 1).sum()) for place in positions)
    return 2 * weights * tokens + 4 * config.num_hidden_layers * width * met


def all_computed(lengths: Sequence[int]) -> list[Tensor]:
    """Every position of prompts of these lengths, for `prefill_flops`."""
    return [torch.ones(length, dtype=torch.bool) for length in lengths]
