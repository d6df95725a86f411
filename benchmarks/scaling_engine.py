"""vLLM's real scheduler, its real block tables and jointkv's real scheduler side, and a worker that only answers.

No model, no pages, no executor: a step is `schedule`, an answer of the right size, and `update_from_output`. What takes
time is what takes time in the scheduler's process of a server. Seconds are those of the processor, the plugin's own as
well, so that others on the machine do not count.
"""

from __future__ import annotations

import gc
import itertools
import json
import pickle
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from jointkv.vllm_plugin import engine_args
from jointkv.vllm_plugin.messages import COSINES, ERRORS, Inquiry, Verdict

BLOCK_SIZE, VOCABULARY, LONGEST = 16, 32_000, 32_768
ALL_BLOCKS = {"min_pool_usage": 0.0, "max_blocks_per_step": 1 << 20}
ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "fusion": ALL_BLOCKS,
    "reuse": {**ALL_BLOCKS, "reuse": "probed"},
    "moved": {**ALL_BLOCKS, "reuse": "probed", "moved": True},
}
"""Options of the plugin; None is vLLM without it. Every block is looked at, at whatever cost."""

CONFIGURATION = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST,
    "torch_dtype": "float32",
}
"""Of a model that nobody loads."""


@dataclass
class Spent:
    """What a number of steps have cost.

    Attributes:
        seconds: of `schedule` and `update_from_output`, by step.
        tokens: scheduled.
        pairs: blocks that were to be compared.
        inquiry_bytes, verdict_bytes: of the messages, as they travel between processes.
        message_seconds: spent on packing and unpacking them.
        pauses: seconds of each collection of garbage.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    pairs: int = 0
    inquiry_bytes: int = 0
    verdict_bytes: int = 0
    message_seconds: float = 0.0
    pauses: list[float] = field(default_factory=list)


class Engine:
    """One scheduler.

    Args:
        folder: where the model's configuration is written.
        arm: one of `ARMS`.
        pages: of the pool.
        running: requests at once.
        step_tokens: scheduled in a step at the most.
        error: relative error that every comparison finds.
    """

    def __init__(
        self, folder: Path, arm: str, pages: int, running: int, step_tokens: int = 8192, error: float = 0.05
    ) -> None:
        time.perf_counter = time.process_time  # in this process alone, and before anything is counted
        self.error, self.spent = error, Spent()
        config = _configuration(folder, ARMS[arm], pages, running, max(step_tokens, running))
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32)
        kv_cache = KVCacheConfig(pages + 1, [], [KVCacheGroupSpec(["layers.0"], spec)])
        config.cache_config.num_gpu_blocks = pages + 1
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            config, kv_cache, StructuredOutputManager(config), block_size=BLOCK_SIZE, log_stats=True
        )
        self.side = None if ARMS[arm] is None else self.scheduler.connector.scheduler
        self._names = itertools.count()
        freeze_gc_heap()  # as vLLM does
        gc.callbacks.append(self._note_pause)

    def submit(self, prompt: Sequence[int], answer: int) -> None:
        """A request of `prompt`, whose answer has so many tokens."""
        sampling = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True, detokenize=False)
        request = Request(f"request-{next(self._names)}", list(prompt), sampling, None, block_hasher=self._hasher)
        self.scheduler.add_request(request)

    def step(self) -> None:
        """One step, added to `spent`."""
        start = time.perf_counter()
        output = self.scheduler.schedule()
        seconds = time.perf_counter() - start
        answer = self._answer(output)
        start = time.perf_counter()
        self.scheduler.update_from_output(output, answer)
        self.spent.seconds.append(seconds + time.perf_counter() - start)
        self.spent.tokens += output.total_num_scheduled_tokens

    def drain(self, until: Callable[[], bool] = lambda: False) -> None:
        """Steps until every request has ended, or `until`."""
        while self.scheduler.has_requests() and not until():
            self.step()

    def take(self) -> tuple[Spent, Counter[str]]:
        """What has been spent since the last call, and what the plugin has counted; anew from here on."""
        spent, self.spent = self.spent, Spent()
        counted: Counter[str] = Counter()
        if self.side is not None:
            assert self.side.state == "active" or not spent.tokens, self.side.recovery
            counted, self.side.statistics._totals = self.side.statistics._totals, Counter()
            self.side.statistics._reported = Counter()
        return spent, counted

    @property
    def resident(self) -> int:
        """Pages that the plugin could lead somebody to."""
        return 0 if self.side is None else len(self.side.candidates.residents.index)

    def _note_pause(self, phase: str, _: Any) -> None:
        if phase == "start":
            self._pause = time.perf_counter()
        else:
            self.spent.pauses.append(time.perf_counter() - self._pause)

    def _answer(self, output: Any) -> ModelRunnerOutput:
        """A token for every request whose prompt is computed, and `error` for every pair."""
        names = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        sampled = [[7] if requests[name].num_computed_tokens >= requests[name].num_tokens else [] for name in names]
        verdict = None if self.side is None else self._verdict(output.kv_connector_metadata)
        return ModelRunnerOutput(
            names,
            {name: row for row, name in enumerate(names)},
            sampled,
            kv_connector_output=KVConnectorOutput(kv_connector_worker_meta=verdict),
        )

    def _verdict(self, inquiry: Inquiry) -> Verdict | None:
        start = time.perf_counter()
        packed = pickle.dumps(inquiry, pickle.HIGHEST_PROTOCOL)
        inquiry = pickle.loads(packed)
        self.spent.message_seconds += time.perf_counter() - start
        self.spent.inquiry_bytes += len(packed)
        self.spent.pairs += len(inquiry.group)
        if not inquiry.asks:
            return None
        pairs = len(inquiry.group)
        verdict = Verdict(
            inquiry.step,
            *np.full((len(ERRORS), pairs), self.error, np.float32),
            *np.ones((len(COSINES), pairs), np.float32),
        )
        start = time.perf_counter()
        packed = pickle.dumps(verdict, pickle.HIGHEST_PROTOCOL)
        verdict = pickle.loads(packed)
        self.spent.message_seconds += time.perf_counter() - start
        self.spent.verdict_bytes += len(packed)
        return verdict


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def random_text(seed: int, blocks: int) -> list[int]:
    """Tokens of whole blocks, all of them unlike any other text's."""
    return np.random.default_rng(seed).integers(10, VOCABULARY, blocks * BLOCK_SIZE).tolist()


def _configuration(folder: Path, options: dict[str, Any] | None, pages: int, running: int, step_tokens: int) -> Any:
    (folder / "config.json").write_text(json.dumps(CONFIGURATION))
    attached = {} if options is None else engine_args(**options)
    if attached:
        attached["kv_transfer_config"] = KVTransferConfig(**attached["kv_transfer_config"])
    return EngineArgs(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=pages + 1,
        max_model_len=LONGEST,
        max_num_seqs=running,
        max_num_batched_tokens=step_tokens,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        **attached,
    ).create_engine_config()
