"""Small engines in this process, one at a time, and what tests look at inside them."""

from __future__ import annotations

import gc
import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from vllm import LLM, SamplingParams
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
from vllm.platforms.cpu import CpuPlatform

from jointkv.policy.reuse import ReuseRule
from jointkv.vllm_plugin import engine_args
from jointkv.vllm_plugin.engine.others import ours

VOCABULARY = 512
WATCHED = {"min_pool_usage": 0.0, "check_integrity": True}
LOSSY = {"max_relative_error": 0.9, "max_token_error": None}
EXACT = {"max_relative_error": 0.0, "max_token_error": 0.0}
BOLD = partial(ReuseRule, near=1.0, echoes=False)
"""Reuses by entry blocks up to the bounds: among so few words as a random model has, everything echoes."""

Prompt = list[int]


def random_model(kind: type[PreTrainedModel], config: PretrainedConfig, embeddings: float = 1.0) -> PreTrainedModel:
    """A model whose answers depend on what was read; `embeddings` is the standard deviation of those."""
    torch.manual_seed(0)
    model: PreTrainedModel = kind(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=embeddings if "embed" in name else weight.shape[1] ** -0.5)
    return model


def write_model(
    folder: Path, context: float, layers: int = 4, heads: int = 4, kv_heads: int = 2, synonyms: float | None = None
) -> Path:
    """Write a random Llama to `folder`; what attention adds to a token grows with `context`.

    With `synonyms`, tokens of the upper half of the vocabulary mean what those of the lower half mean, so far apart.
    """
    config = LlamaConfig(
        hidden_size=32 * heads,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = random_model(LlamaForCausalLM, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name and synonyms is not None:
                lower, upper = weight.chunk(2)
                upper.copy_(lower + synonyms * torch.randn_like(lower))
            if "o_proj" in name:
                weight.mul_(context)
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(2.0)
    model.save_pretrained(folder)
    return folder


@dataclass
class Engine:
    """One running engine.

    Attributes:
        watchers: called after every step.
        outputs, logprobs: tokens of finished requests, and their log-probabilities where they were asked for.
        steps, most_running, peak_pages, preempted, cached_tokens, drafted: counted since the start; tokens of prompts
        that the prefix cache answered, and tokens drafted for a step to come.
    """

    llm: Any
    watchers: list[Callable[[Engine], None]] = field(default_factory=list)
    outputs: dict[str, Prompt] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    steps: int = 0
    most_running: int = 0
    peak_pages: int = 0
    cached_tokens: int = 0
    preempted: int = 0
    drafted: int = 0
    _names: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        preempt = self.vllm_scheduler._preempt_request

        def counted(*args: Any, **options: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **options)

        self.vllm_scheduler._preempt_request = counted

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def vllm_scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def pool(self) -> Any:
        return self.vllm_scheduler.kv_cache_manager.block_pool

    @property
    def connector(self) -> Any:
        """The plugin's, wherever it stands; None in the stock engine."""
        return ours(self.vllm_scheduler.connector)

    @property
    def side(self) -> Any:
        """The plugin's side at the scheduler."""
        return self.connector.scheduler

    @property
    def statistics(self) -> dict[str, Any]:
        return self.connector.scheduler.totals()

    @property
    def runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def pages_in_use(self) -> int:
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()

    @property
    def references(self) -> int:
        return sum(block.ref_cnt for block in self.pool.blocks if not block.is_null)

    def submit(
        self,
        prompt: Prompt,
        out: int = 8,
        salt: str | None = None,
        extra: dict[str, Any] | None = None,
        lora: Any = None,
        priority: int = 0,
        **more: Any,
    ) -> str:
        """Add a request that produces `out` tokens, with an adapter if `lora` is given; its name."""
        name = f"request-{next(self._names)}"
        text: dict[str, Any] = {"prompt_token_ids": list(prompt)}
        if salt is not None:
            text["cache_salt"] = salt
        params = SamplingParams(
            max_tokens=out, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra, **more
        )
        self.llm.llm_engine.add_request(name, text, params, lora_request=lora, priority=priority)
        return name

    def abort(self, name: str) -> None:
        self.llm.llm_engine.abort_request([name])

    def step(self) -> None:
        for output in self.llm.llm_engine.step():
            if output.finished:
                answer = output.outputs[0]
                self.outputs[output.request_id] = list(answer.token_ids)
                if answer.logprobs:
                    chosen = zip(answer.logprobs, answer.token_ids, strict=True)
                    self.logprobs[output.request_id] = [position[token].logprob for position, token in chosen]
                self.cached_tokens += output.num_cached_tokens or 0
        self.steps += 1
        self.most_running = max(self.most_running, len(self.vllm_scheduler.running))
        self.peak_pages = max(self.peak_pages, self.pages_in_use)
        self.drafted += sum(len(request.spec_token_ids) for request in self.vllm_scheduler.running)
        for watcher in self.watchers:
            watcher(self)

    def finish(self) -> None:
        """Step until nothing is left to do."""
        while self.llm.llm_engine.has_unfinished_requests():
            self.step()

    def generate(self, prompts: Sequence[Prompt], out: int = 8, **options: Any) -> list[Prompt]:
        """Outputs of requests that are all there from the start."""
        names = [self.submit(prompt, out, **options) for prompt in prompts]
        self.finish()
        return [self.outputs[name] for name in names]

    @contextmanager
    def watched(self) -> Iterator[list[tuple[Any, list[Any]]]]:
        """Statistics and outputs that clients get meanwhile, by step."""
        seen: list[tuple[Any, list[Any]]] = []
        update = self.vllm_scheduler.update_from_output

        def watching(*args: Any) -> Any:
            outputs = update(*args)
            seen.extend((client.scheduler_stats, list(client.outputs)) for client in outputs.values())
            return outputs

        with patch.object(self.vllm_scheduler, "update_from_output", watching):
            yield seen

    def run_until_decoding(self) -> None:
        """Step until every request has read its prompt."""
        while any(
            request.num_computed_tokens < request.num_prompt_tokens for request in self.vllm_scheduler.requests.values()
        ):
            self.step()

    def table(self, name: str, group: int = 0) -> list[int]:
        """Pages of a request as the scheduler knows them. vLLM adds a random end to names of requests."""
        tables = self.vllm_scheduler.kv_cache_manager.coordinator.single_type_managers[group].req_to_blocks
        (found,) = (key for key in tables if key == name or key.startswith(f"{name}-"))
        return [block.block_id for block in tables[found]]

    def page(self, number: int) -> Tensor:
        """A copy of the bytes of a page: `[layers, elements]` in the engine's own order."""
        layers = self.core.vllm_config.compilation_config.static_forward_context.values()
        return torch.stack([layer.kv_cache[number].flatten().clone() for layer in layers])

    def pages_by_hash(self) -> dict[bytes, list[tuple[int, Tensor]]]:
        """Number and content of every page that answers for a hash of the prefix cache."""
        found: dict[bytes, list[tuple[int, Tensor]]] = {}
        for key, held in self.pool.cached_block_hash_to_block._cache.items():
            blocks = held.values() if isinstance(held, dict) else [held]
            found[key] = [(block.block_id, self.page(block.block_id)) for block in blocks]
        return found

    def assert_drained(self) -> None:
        """Nothing runs, every page is free, nobody reads any."""
        assert not self.vllm_scheduler.requests
        assert self.pages_in_use == 0 and self.references == 0
        if self.connector is not None:
            self.side.tables.check_integrity()
            self.side.candidates.residents.index.check_integrity()
            assert not self.side.requests.active


@contextmanager
def engine(
    model: Path,
    pages: int = 200,
    fusion: dict[str, Any] | None = None,
    beside: Sequence[dict[str, Any]] = (),
    **options: Any,
) -> Iterator[Engine]:
    """An engine of this process; `fusion` are options of the plugin, None is the stock engine; see `engine_args`."""
    with released_at_exit():
        settings: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "num_gpu_blocks_override": pages,
            "max_model_len": 1024,
            "block_size": 32,
            "max_num_seqs": 64,
            "skip_tokenizer_init": True,
            "seed": 0,
        }
        if os.environ.get("JOINTKV_TEST_DEVICE") == "cuda":  # several at once, which measure no free memory
            settings |= {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 4 * 2**30}
        attached = {} if fusion is None else engine_args(beside, **{**WATCHED, **fusion})
        with kept_asynchronous() if options.get("async_scheduling") else nullcontext():
            llm = LLM(str(model), **{**settings, **attached, **options})
        try:
            yield Engine(llm)
        finally:
            llm.llm_engine.engine_core.shutdown()


@contextmanager
def kept_asynchronous() -> Iterator[None]:
    """vLLM's CPU platform takes asynchronous scheduling back; nothing but that keeps it from it."""
    check = CpuPlatform.check_and_update_config

    def checked(config: Any) -> None:
        wanted = config.scheduler_config.async_scheduling
        check(config)
        config.scheduler_config.async_scheduling = wanted

    with patch.object(CpuPlatform, "check_and_update_config", staticmethod(checked)):
        yield


@contextmanager
def released_at_exit() -> Iterator[None]:
    """Whatever vLLM leaves in this process is undone, so that the next engine can start."""
    cores, set_num_threads = os.sched_getaffinity(0), torch.set_num_threads
    # vLLM collects garbage again and again, and thaws all that is frozen before: with all its modules loaded an engine
    # would take four times as long to end as to start. What is left of the last engine goes first.
    gc.collect()
    gc.freeze()
    try:
        with patch.multiple(gc, freeze=lambda: None, unfreeze=lambda: None):
            yield
    finally:
        ensure_kv_transfer_shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()
        os.sched_setaffinity(0, cores)
        torch.set_num_threads = set_num_threads


def text(count: int, seed: int) -> Prompt:
    """Random tokens."""
    rng = random.Random(seed)
    return [rng.randrange(10, VOCABULARY) for _ in range(count)]


def in_other_words(prompt: Prompt, seed: int) -> Prompt:
    """Some tokens of `prompt` by their synonyms, see `write_model`; every block of it has other tokens."""
    rng, half = random.Random(seed), VOCABULARY // 2
    return [token % half + half * rng.randrange(2) for token in prompt]


def near_prefix(count: int, shared: int = 700, head: int = 16, tail: int = 20, seed: int = 0) -> list[Prompt]:
    """Prompts with a head and a tail of their own around text at equal positions."""
    middle = text(shared, 1000 + seed)
    return [
        text(head, 10_000 * (seed + 1) + 2 * number) + middle + text(tail, 10_000 * (seed + 1) + 2 * number + 1)
        for number in range(count)
    ]
