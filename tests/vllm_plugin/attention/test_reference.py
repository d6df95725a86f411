"""The engine's tokens against transformers, step by step, on the same plan of replaced blocks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.vllm_plugin.attention.norms import OwnNorms
from tests.vllm_plugin.engines import Engine, Prompt, engine, near_prefix

OUT, BLOCK_SIZE = 24, 32


@dataclass
class Step:
    """What one request does in one step: blocks `[layers, 2]` of `[tokens, heads, d]` that replace its own, by slot,
    then the tokens from `begin` to `end`."""

    begin: int
    end: int
    replaced: dict[int, list[list[Tensor]]] = field(default_factory=dict)


class Plan:
    """The steps of every request, written down as the engine takes them.

    Attributes:
        steps: by request.
        with_norms: replaced blocks with a factor that is not 1.
    """

    def __init__(self, served: Engine) -> None:
        self.steps: dict[str, list[Step]] = defaultdict(list)
        self.with_norms = 0
        self._layers = served.core.vllm_config.compilation_config.static_forward_context.values()
        self._committed: list[Any] = []
        worker = get_kv_transfer_group().worker
        commit, follow = worker.norms.commit, worker.follow

        def committed(remaps: list[Any]) -> None:
            commit(remaps)
            self._committed = list(remaps)

        def followed(output: Any) -> None:
            self._write_down(output, worker.norms)
            follow(output)

        worker.norms.commit, worker.follow = committed, followed

    def _write_down(self, output: Any, norms: OwnNorms) -> None:
        running = output.scheduled_cached_reqs
        begins = dict(zip(running.req_ids, running.num_computed_tokens, strict=True))
        begins |= {request.req_id: request.num_computed_tokens for request in output.scheduled_new_reqs}
        for name, count in output.num_scheduled_tokens.items():
            self.steps[name].append(Step(begins[name], begins[name] + count))
        for remap in self._committed:
            factors = norms._proposed[remap.step][remap.group, remap.own, remap.page]
            self.steps[remap.request_id][-1].replaced[remap.slot] = [
                [factor * side[remap.page] for factor, side in zip(by_side, layer.impl.pages.read(), strict=True)]
                for by_side, layer in zip(factors, self._layers, strict=True)
            ]
            self.with_norms += bool((factors != 1).any())
        self._committed = []


def replay(model: LlamaForCausalLM, prompt: Prompt, steps: list[Step]) -> Prompt:
    """The tokens that transformers chooses."""
    cache, tokens = DynamicCache(), list(prompt)
    for step in steps:
        for slot, layers in step.replaced.items():
            where = slice(slot * BLOCK_SIZE, (slot + 1) * BLOCK_SIZE)
            for kept, (key, value) in zip(cache.layers, layers, strict=True):
                kept.keys[0, :, where], kept.values[0, :, where] = key.transpose(0, 1), value.transpose(0, 1)
        with torch.no_grad():
            logits = model(torch.tensor([tokens[step.begin : step.end]]), past_key_values=cache).logits
        if step.end == len(tokens):
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_the_tokens_are_those_of_transformers_on_the_same_plan(calm: Path) -> None:
    prompts = near_prefix(8, shared=320)
    lossy = {"max_relative_error": 0.5, "max_token_error": None, "own_norms": True}
    with engine(calm, fusion=lossy, max_num_batched_tokens=256, enable_chunked_prefill=True) as served:
        plan = Plan(served)
        found = served.generate(prompts, OUT)
        assert served.preempted == served.cached_tokens == 0 and plan.with_norms > 20
    model = LlamaForCausalLM.from_pretrained(calm, dtype=torch.float32)
    by_prompt = {name.split("-")[1]: steps for name, steps in plan.steps.items()}
    expected = [replay(model, prompt, by_prompt[str(number)]) for number, prompt in enumerate(prompts)]
    assert found == expected
    unfused = [
        replay(model, prompt, [Step(step.begin, step.end) for step in by_prompt[str(number)]])
        for number, prompt in enumerate(prompts)
    ]
    assert unfused != expected  # the blocks that were replaced matter
