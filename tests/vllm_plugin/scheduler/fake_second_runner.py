"""The runner without a model once more, with requests and tables as vLLM's second model runner keeps them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.states import RequestState

from tests.vllm_plugin.scheduler.fake_worker import Runner, _nothing


class SecondRunner(Runner):
    """See the module."""

    finish_requests = GPUModelRunner.finish_requests
    add_requests = GPUModelRunner.add_requests
    update_requests = GPUModelRunner.update_requests
    _remove_request = GPUModelRunner._remove_request
    model_state = lora_state = SimpleNamespace(
        add_request=_nothing, remove_request=_nothing, apply_staged_writes=_nothing
    )
    pooling_runner = pp_handler = encoder_cache = prompt_logprobs_worker = adaptive_verification = sampler = None
    is_last_pp_rank = False  # or requests would need a sampler
    decode_query_len = 1

    def __init__(self, config: Any, kv_cache_config: Any, *more: Any) -> None:
        super().__init__(config, kv_cache_config, *more)
        del self.requests, self.input_batch
        sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
        length, rows = config.model_config.max_model_len, config.scheduler_config.max_num_seqs
        tokens = config.scheduler_config.max_num_batched_tokens
        self.kernel_block_sizes = sizes
        vocabulary = config.model_config.get_vocab_size()
        self.req_states = RequestState(rows, length, tokens, 0, vocabulary, self.device)
        widths = [cdiv(length, size) for size in sizes]
        self.block_tables = BlockTables(sizes, rows, tokens, widths, self.device)
        self._tokens: dict[str, list[int]] = {}

    def take_in(self, output: Any) -> None:
        """Requests and tables as the step has them, in the order of vLLM's runner."""
        self.finish_requests(output)
        self.add_requests(output)
        self._tokens.update((new.req_id, list(new.prefill_token_ids)) for new in output.scheduled_new_reqs)
        self.update_requests(output)
        self.block_tables.apply_staged_writes()

    def _computed(self, name: str) -> int:
        return int(self.req_states.num_computed_tokens_np[self.req_states.req_id_to_index[name]])

    def _known(self, name: str) -> list[int]:
        return self._tokens[name]

    def _sampled(self, name: str, token: int) -> None:
        self._tokens[name].append(token)

    def _tables(self, name: str) -> list[list[int]]:
        row, lengths = self.req_states.req_id_to_index[name], self.block_tables.num_blocks.np
        tables = [table.gpu[row] for table in self.block_tables.block_tables]
        return [table[: lengths[number, row]].tolist() for number, table in enumerate(tables)]


def write(table: StagedWriteTensor) -> None:
    """In the place of a kernel: what `StagedWriteTensor.apply_write` does."""
    first = 0
    staged = (table._staged_write_indices, table._staged_write_starts, table._staged_write_cu_lens)
    for row, start, end in zip(*staged, strict=True):
        values = table.gpu.new_tensor(table._staged_write_contents[first:end])
        flat = table.gpu[row : row + 1] if table.gpu.dim() == 1 else table.gpu[row]
        flat[start : start + len(values)] = values
        first = end
    table.clear_staged_writes()


def write_all(writer: FusedStagedWriter, tables: Any, pointers: Any, strides: Any) -> None:
    """In the place of another: what `FusedStagedWriter.apply` does."""
    for table in tables:
        write(table)
