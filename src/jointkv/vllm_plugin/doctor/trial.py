"""A small engine, duplicate prompts, and what is seen while they run. For the doctor."""

from __future__ import annotations

import gc
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointkv.vllm_plugin import engine_args

BLOCK_SIZE = 32
PROMPTS, COPIES = 2, 4
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 36
# The last token's K and V are never computed.
EXPECTED_MERGES = PROMPTS * (COPIES - 1) * ((PROMPT_TOKENS + OUTPUT_TOKENS - 1) // BLOCK_SIZE)
POOL_PAGES = 128
MAX_TOKENS = 512
SYNONYMS = range(1, 5)
"""Token ids of the tiny model. No other prompt has them."""

TINY_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": MAX_TOKENS,
    "tie_word_embeddings": False,
    # Large enough for an answer to depend on all that was read: a page of another request would show.
    "initializer_range": 0.1,
}


@dataclass
class Trial:
    """What a run of prompts did.

    Attributes:
        outputs: per prompt its token ids and their log-probabilities.
        used: pages in use after every step.
        freed: pages that merging had given back after every step, since the start of the engine.
    """

    outputs: list[tuple[list[int], list[float]]]
    used: list[int]
    freed: list[int]


class Overheard:
    """Counts what the scheduler's and the worker's side say to each other, from now on."""

    def __init__(self, scheduler: Any, worker: Any) -> None:
        self.counts: Counter[str] = Counter()
        self._runner = worker.tables.runner
        _listen(scheduler, "next_inquiry", self._asked)
        _listen(scheduler, "settle", self._answered)
        _listen(worker, "apply", self._applied)

    def _asked(self, inquiry: Any, output: Any) -> None:
        self.counts["inquiries"] += len(inquiry.group) > 0
        self.counts["pairs"] += len(inquiry.group)
        self.counts["remaps"] += len(inquiry.remaps)
        self.counts["compared"] += bool(inquiry.tables)

    def _answered(self, result: None, verdict: Any) -> None:
        self.counts["answered"] += len(verdict.key_error)
        self.counts["equal"] += int((verdict.key_error + verdict.value_error == 0).sum())

    def _applied(self, result: None, inquiry: Any) -> None:
        for request_id, group, slot, page, *_ in inquiry.remaps:
            request = self._runner.requests.get(request_id)
            # A request that has left is passed over rightly; its table is gone with it.
            self.counts["applied"] += request is None or request.block_ids[group][slot] == page


def _listen(owner: Any, name: str, heard: Callable[..., None]) -> None:
    method = getattr(owner, name)

    def overheard(*arguments: Any) -> Any:
        result = method(*arguments)
        heard(result, *arguments)
        return result

    setattr(owner, name, overheard)


def write_tiny_model(folder: Path) -> str:
    """Write a random Llama of a few hundred kilobytes, always the same. `SYNONYMS` mean nearly the same to it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY_MODEL))
    with torch.no_grad():
        meanings = model.model.embed_tokens.weight
        apart = 0.02 * torch.randn(len(SYNONYMS), meanings.shape[1]) * meanings.std()
        meanings[list(SYNONYMS)] = meanings[SYNONYMS[0]] + apart
    model.save_pretrained(folder)
    return str(folder)


def build_engine(model: str, fusion: dict[str, Any] | None, *, near_prefix: bool = False) -> Any:
    """An `LLMEngine` in this process. `fusion` are options of `PluginSettings`; None leaves the plugin out.

    Args:
        near_prefix: it is to serve prompts that differ in their first token. Else prefix caching is off: it would share
            equal prompts before the plugin sees them. Only one engine with metrics fits into a process.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    arguments = {} if fusion is None else {**engine_args(**fusion), "disable_log_stats": near_prefix}
    return LLM(
        model,
        dtype="float32" if current_platform.is_cpu() else "auto",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=near_prefix,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=POOL_PAGES,
        max_model_len=MAX_TOKENS,
        seed=0,
        **arguments,
    ).llm_engine


def stop_engine(engine: Any) -> None:
    """End `engine` so that another one can be built in this process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()


def trial_prompts(engine: Any) -> list[dict[str, Any]]:
    """`PROMPTS` random prompts, `COPIES` times each."""
    draw, words = random.Random(0), vocabulary(engine)
    distinct = [[draw.choice(words) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
    return [{"prompt_token_ids": tokens} for _ in range(COPIES) for tokens in distinct]


def salted_prompts(engine: Any) -> list[dict[str, Any]]:
    """One prompt, `COPIES` times, each with a salt of its own."""
    first = trial_prompts(engine)[0]
    return [{**first, "cache_salt": f"tenant {number}"} for number in range(COPIES)]


def run_trial(engine: Any, prompts: list[dict[str, Any]]) -> Trial:
    """Submit all prompts at once and step until all have finished."""
    from vllm import SamplingParams

    scheduler = engine.engine_core.engine_core.scheduler
    pool, connector = scheduler.kv_cache_manager.block_pool, scheduler.connector
    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    names = [f"{time.monotonic_ns()}-{number}" for number in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, prompt, sampling)
    outputs: dict[str, tuple[list[int], list[float]]] = {}
    trial = Trial([], [], [])
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                answer = output.outputs[0]
                tokens = list(answer.token_ids)
                chosen = zip(answer.logprobs, tokens, strict=True)
                outputs[output.request_id] = tokens, [position[token].logprob for position, token in chosen]
        trial.used.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        trial.freed.append(0 if connector is None else connector.scheduler.totals()["pages_freed"])
    trial.outputs = [outputs[name] for name in names]
    return trial


def vocabulary(engine: Any) -> range:
    """Token ids to draw prompts from."""
    size = engine.vllm_config.model_config.get_vocab_size()
    return range(min(10, size - 1), size)
