"""A worker without a model: vLLM's own tables, jointkv's own remaps, and pages that hold numbers instead of K and V."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group, kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorWorkerMetadata
from vllm.utils.math_utils import cdiv
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.pool.late_interaction_runner import LateInteractionRunner
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import CompilationTimes

from jointkv.vllm_plugin.engine.others import ours
from jointkv.vllm_plugin.engine.pages import NULL_PAGE
from jointkv.vllm_plugin.messages import Verdict
from jointkv.vllm_plugin.worker.mixin import RemappingWorker
from tests.vllm_plugin.scheduler.fake_pages import LAYERS, Model, Pages


class Mail:
    """The way of verdicts from the worker to the scheduler, with the accidents a test asks for.

    Args:
        ranks: workers that answer; all give the same answer.

    Attributes:
        accident: what happens to the next verdict: `"lost"`, `"late"` (it comes in the place of a later one), `"twice"`
            or `"fault"`; None delivers.
    """

    def __init__(self, ranks: int = 1) -> None:
        self.accident: str | None = None
        self._ranks = ranks
        self._held: list[Verdict] = []

    def carry(self, verdict: Verdict | None) -> Verdict | None:
        """What arrives with the output of this step."""
        if verdict is None:
            return self._held.pop() if self._held else None
        for _ in range(1, self._ranks):
            verdict = verdict.aggregate(replace(verdict, ranks=1))
        accident, self.accident = self.accident, None
        if accident == "fault":
            return Verdict.given_up(verdict.step, "on purpose")
        if accident in ("late", "twice"):
            held, self._held = self._held, [verdict]
            return verdict if accident == "twice" else held.pop() if held else None
        return None if accident == "lost" else verdict


def _nothing(*args: Any, **options: Any) -> None:
    pass


class Runner:
    """Keeps requests and tables with vLLM's own code, and writes numbers where it would compute.

    Attributes:
        watcher: called after every request with its name, its first computed token and all its numbers.
    """

    _update_states = GPUModelRunner._update_states
    _on_request_state_removed = _process_encoder_cache_scheduler_output = _may_reorder_batch = _nothing
    speculative_config = None
    use_async_spec_decode = False
    is_pooling_model = False
    uses_mrope = False

    def __init__(self, config: Any, kv_cache_config: Any, model: Model, mail: Mail, watcher: Any) -> None:
        self.vllm_config = config
        self.model, self.mail, self.watcher = model, mail, watcher
        self.use_async_scheduling = config.scheduler_config.async_scheduling
        self.device = torch.device("cpu")
        self.requests: dict[str, Any] = {}
        self.num_prompt_logprobs: dict[str, int] = {}
        self.late_interaction_runner = LateInteractionRunner()
        groups = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        length = config.model_config.max_model_len
        self.input_batch = InputBatch(
            max_num_reqs=config.scheduler_config.max_num_seqs,
            max_model_len=length,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            device=self.device,
            vocab_size=config.model_config.get_vocab_size(),
            block_sizes=[group.block_size for group in groups],
            max_num_blocks_per_req=[cdiv(length, group.block_size) for group in groups],
        )
        self.pages = Pages(kv_cache_config.num_blocks, groups[0].block_size)
        self._output: ModelRunnerOutput | None = None

    def synchronize_input_prep(self) -> Any:
        return nullcontext()

    def take_in(self, output: Any) -> None:
        """Requests and tables as the step has them."""
        self._update_states(output)

    def execute_model(self, output: Any) -> ModelRunnerOutput | None:
        """One step, in the order of vLLM's runner; the result is asked for by `sample_tokens` unless there is none."""
        self.take_in(output)
        self.watcher.begin(output)
        connector: Any = get_kv_transfer_group()
        connector.bind_connector_metadata(output.kv_connector_metadata)
        connector.start_load_kv(None)
        # A request may read pages that one before it writes in the same step.
        sampled = {name: self._compute(name, count) for name, count in output.num_scheduled_tokens.items()}
        connector.wait_for_save()
        arrived = KVConnectorOutput(kv_connector_worker_meta=self._answer(connector))
        connector.clear_connector_metadata()
        if not sampled:
            return ModelRunnerOutput.with_kv_conn_output_only(arrived)
        names = list(sampled)
        self._output = ModelRunnerOutput(
            names,
            {name: row for row, name in enumerate(names)},
            [sampled[name] for name in names],
            kv_connector_output=arrived,
        )
        return None

    def _answer(self, connector: Any) -> Any:
        """What arrives of the verdict, in the place of its connector, the first of several."""
        verdict = self.mail.carry(ours(connector).build_connector_worker_meta())
        return verdict if ours(connector) is connector else MultiKVConnectorWorkerMetadata((verdict, None))

    def sample_tokens(self) -> ModelRunnerOutput | None:
        output, self._output = self._output, None
        return output

    def _compute(self, name: str, count: int) -> list[int]:
        """Write the next `count` tokens of a request; the sampled token, if its last known one is among them."""
        first, tokens, tables = self._computed(name), self._known(name), self._tables(name)
        past = [self.pages.read(table, first) for table in tables]
        self._read_in_place(name, tables[0][: -(-first // self.pages.size)], past[0])
        self.model.extend(past, tokens[first : first + count])
        by = name, self.watcher.salt(name), self.model.version
        for place in range(first, first + count):
            for numbers, table in zip(past, tables, strict=True):
                page = table[place // self.pages.size]
                self.pages.write(page, place % self.pages.size, numbers[place], (place, tokens[place]), by)
        self.watcher.computed(name, first, past)
        if first + count < len(tokens):
            return []
        token = self.model.sample(past)
        self._sampled(name, token)
        return [token]

    def _read_in_place(self, name: str, table: Sequence[int], past: list[int]) -> None:
        """What a request reads where it has no page."""
        reads, size = ours(get_kv_transfer_group()).worker.in_place, self.pages.size
        fills = None if reads is None else reads._of.get(name)
        slots = [slot for slot, page in enumerate(table) if page == NULL_PAGE]
        assert slots == ([] if fills is None else fills.slots.tolist()), f"nobody knows what {name} reads"
        for slot, tokens in zip(slots, () if fills is None else self.pages.moved(fills), strict=True):
            past[slot * size : (slot + 1) * size] = [number for _, number, _ in tokens]

    def _computed(self, name: str) -> int:
        """Tokens of a request that are computed before the step."""
        return int(self.input_batch.num_computed_tokens_cpu[self.input_batch.req_id_to_index[name]])

    def _known(self, name: str) -> list[int]:
        """Its tokens."""
        request = self.requests[name]
        return [*request.prompt_token_ids, *request.output_token_ids]

    def _sampled(self, name: str, token: int) -> None:
        self.requests[name].output_token_ids.append(token)

    def _tables(self, name: str) -> list[list[int]]:
        """The rows of the batch, which attention reads."""
        row = self.input_batch.req_id_to_index[name]
        tables = self.input_batch.block_table.block_tables
        return [table.block_table.np[row, : table.num_blocks_per_row[row]].tolist() for table in tables]


class BareWorker:
    """What `RemappingWorker` is mixed into: vLLM's worker without device and model."""

    def __init__(self, vllm_config: Any, make_runner: Callable[..., Runner]) -> None:
        self.vllm_config = vllm_config
        self._make_runner = make_runner

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return ["LBHNC"]

    def set_kv_cache_layout(self, *_: Any) -> None:
        pass

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        size = self.vllm_config.cache_config.block_size
        spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=8, dtype=torch.float32)
        return {f"layers.{number}": spec for number in range(LAYERS)}

    def determine_available_memory(self) -> int:
        return 1 << 30

    def initialize_from_config(self, configs: Sequence[Any]) -> None:
        (config,) = configs
        kv_transfer_state._KV_CONNECTOR_AGENT = KVConnectorFactory.create_connector(
            self.vllm_config, KVConnectorRole.WORKER, config
        )
        self.model_runner = self._make_runner(self.vllm_config, config)
        context = self.vllm_config.compilation_config.static_forward_context
        layers = {f"layers.{number}": self.model_runner.pages for number in range(LAYERS)}
        context.update(layers)
        kv_transfer_state._KV_CONNECTOR_AGENT.register_kv_caches(layers)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        return CompilationTimes(0.0, 0.0)

    def get_kv_connector_handshake_metadata(self) -> None:
        return None

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        return self.model_runner.execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput | None:
        return self.model_runner.sample_tokens()

    def shutdown(self) -> None:
        pass


class FakeWorker(RemappingWorker, BareWorker):
    """jointkv's worker around `BareWorker`."""


def executor_of(make_runner: Callable[..., Runner]) -> type[UniProcExecutor]:
    """An executor whose one worker is a `FakeWorker`."""

    class FakeExecutor(UniProcExecutor):
        def _init_executor(self) -> None:
            self.driver_worker = FakeWorker(self.vllm_config, make_runner)

    return FakeExecutor
