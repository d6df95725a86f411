"""Prompts whose text stands in earlier ones, computed around it: what is computed reads what is not as it was found.

Sources are exact prefills of all earlier prompts, which is more than a server has. Text is found as reuse finds it, at
any position, and its keys are turned; which of the found tokens are computed all the same is what methods differ in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from jointkv.attention.rotary import Rotary
from jointkv.core.moved import MovedRun
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.dense import LayerStates, dense_cache, layer_states, nbytes_of
from jointkv.evaluate.holding.held import RebuiltBatch
from jointkv.evaluate.holding.work import Work, all_computed, prefill_flops
from jointkv.fusion.content_index import ContentIndex
from jointkv.policy.reuse import ReuseRule


@dataclass(frozen=True, eq=False)
class FoundText:
    """What of one prompt stands in earlier ones.

    Attributes:
        runs: in their order; the first is equal from the first token on if it stands at token 0 in both.
        states: K, turned to where it is read, and V of the sources, `[1, h, n, d]` per layer; zeros where nothing is.
        exact: K and V that the model computes for this prompt, which a method may use where it computes them too.
    """

    runs: tuple[MovedRun, ...]
    states: LayerStates
    exact: LayerStates

    @property
    def prefix(self) -> int:
        """Tokens that are equal from the first one on, which every method reads as they are."""
        first = self.runs[0] if self.runs else None
        return first.tokens if first is not None and first.first == first.shift == 0 else 0

    @property
    def found(self) -> Tensor:
        """Which tokens stand in earlier prompts, bool `[n]`."""
        found = torch.zeros(self.states[0][0].shape[2], dtype=torch.bool)
        for run in self.runs:
            found[run.first : run.end] = True
        return found


Chosen = Callable[[FoundText], Tensor]
"""Which of the found tokens are computed all the same, bool `[n]`."""


class PatchedBatch(RebuiltBatch):
    """Prompts one after another: what was not found is computed, and what `chosen` says.

    Args:
        whole_layers: at the bottom, in which all tokens are computed.
    """

    counted = "tensors"

    @torch.inference_mode()
    def __init__(self, batch: Batch, rotary: Sequence[Rotary], chosen: Chosen, whole_layers: int = 0) -> None:
        super().__init__(batch.model, batch.lengths)
        self._states: list[LayerStates] = []
        computed = list[Tensor]()
        for text in found_texts(batch, rotary):
            mask = ~text.found | chosen(text)
            mask[: text.prefix] = False
            states = [*text.exact[:whole_layers], *text.states[whole_layers:]]
            self._states.append(_patched(batch.model, batch.requests[len(computed)].prompt, states, mask))
            computed.append(mask)
        self.nbytes = sum(map(nbytes_of, self._states))
        self.work = _work(batch, computed, whole_layers)

    def rebuild(self, request: int) -> LayerStates:
        return self._states[request]


def found_texts(batch: Batch, rotary: Sequence[Rotary]) -> list[FoundText]:
    """What of each prompt stands in those before it, in stretches as long as reuse asks for."""
    size, least = batch.block_size, ReuseRule().least * batch.block_size
    index, texts, pages = ContentIndex(size), list[FoundText](), 0
    for row, request in enumerate(batch.requests):
        tokens = np.array(request.prompt[:-1], np.int64)
        exact = layer_states(batch.dense[row])
        runs = tuple(index.find(None, tokens, least))
        sources = [layer_states(batch.dense[run.source]) for run in runs]
        texts.append(FoundText(runs, _turned(runs, sources, exact, rotary), exact))
        blocks = len(tokens) // size
        index.add(
            None, tokens[: blocks * size].reshape(blocks, size), np.arange(blocks), pages + np.arange(blocks), row
        )
        pages += blocks
    return texts


def _turned(
    runs: Sequence[MovedRun], sources: Sequence[LayerStates], exact: LayerStates, rotary: Sequence[Rotary]
) -> LayerStates:
    """K and V of `runs` where they are read, in tensors as large as `exact`."""
    states = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in exact]
    for run, source in zip(runs, sources, strict=True):
        here, there = slice(run.first, run.end), slice(run.first - run.shift, run.end - run.shift)
        shift = torch.full((run.tokens,), run.shift)
        for (keys, values), (from_keys, from_values), layer in zip(states, source, rotary, strict=True):
            keys[0, :, here] = layer.turn(from_keys[0, :, there].transpose(0, 1), shift).transpose(0, 1)
            values[:, :, here] = from_values[:, :, there]
    return states


def _patched(model: PreTrainedModel, prompt: Sequence[int], states: LayerStates, computed: Tensor) -> LayerStates:
    """`states`, and in their place K and V of the tokens `computed [n]`, each behind all that stands before it."""
    if not computed.any():
        return states
    place, kept = computed.nonzero().squeeze(1), (~computed).nonzero().squeeze(1)
    cache: Any = dense_cache(model, [(k[:, :, kept], v[:, :, kept]) for k, v in states])
    behind = torch.cat((kept, place))[None] > place[:, None]
    mask = torch.zeros(behind.shape, dtype=model.dtype).masked_fill(behind, torch.finfo(model.dtype).min)
    model(
        input_ids=torch.tensor(prompt)[place][None].to(model.device),
        attention_mask=mask[None, None].to(model.device),
        position_ids=place[None].to(model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    order = torch.cat((kept, place)).argsort()
    return [(k[:, :, order], v[:, :, order]) for k, v in layer_states(cache)]


def _work(batch: Batch, computed: Sequence[Tensor], whole_layers: int) -> Work:
    """Tokens that are computed in `whole_layers` only count by their share of the layers in `flops`."""
    every = all_computed(batch.lengths)
    layers = batch.model.config.get_text_config(decoder=True).num_hidden_layers
    flops, unfused = prefill_flops(batch.model, computed), prefill_flops(batch.model, every)
    tokens = sum(batch.lengths)
    return Work(
        tokens=tokens,
        exact_tokens=0,
        skipped_tokens=tokens - int(sum(int(mask.sum()) for mask in computed)),
        flops=flops + (unfused - flops) * whole_layers // layers,
        flops_unfused=unfused,
        reused_blocks=0,
        missed_blocks=0,
    )
