"""The block tables of vLLM's second model runner, which are on the device alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from jointkv.errors import LayoutError
from jointkv.system.interfaces import Use
from jointkv.vllm_plugin.engine.runners.base import Remap, WorkerTables

RUNNER = "vllm.v1.worker.gpu"


class V2Tables(WorkerTables):
    """Tables on the device, and, for who asks for the rows of a step, a copy of them on the host."""

    USES = (
        Use(f"{RUNNER}.model_runner:GPUModelRunner", "block_tables req_states decode_query_len"),
        Use(f"{RUNNER}.model_runner", "sort_batch_req_ids(_,_,_)"),
        Use(f"{RUNNER}.states:RequestState", "req_id_to_index"),
        Use(f"{RUNNER}.block_table:BlockTables", "block_tables num_blocks"),
        Use(f"{RUNNER}.buffer_utils:StagedWriteTensor", "gpu"),
        Use(f"{RUNNER}.buffer_utils:UvaBackedTensor", "np"),
        Use("vllm.utils.torch_utils", "async_tensor_h2d(_,_,_)"),
        Use("vllm.v1.core.sched.output:SchedulerOutput", "finished_req_ids scheduled_spec_decode_tokens"),
    )

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._held: dict[str, list[_Row]] = {}
        self._order: list[str] = []

    def between_steps(self) -> AbstractContextManager[Any]:
        """See `WorkerTables`. Whatever reads or writes the tables does so in the order of one stream."""
        return nullcontext()

    def block_size(self, group: int) -> int:
        """See `WorkerTables`. Raises `LayoutError` where the runner does not say."""
        sizes = getattr(self.runner, "kernel_block_sizes", None)  # set when its pages are allocated
        if sizes is None or not 0 <= group < len(sizes):
            raise LayoutError(f"vLLM's model runner V2 does not say what block size attention has in group {group}")
        return int(sizes[group])

    def replace(self, remaps: Sequence[Remap]) -> None:
        """See `WorkerTables`."""
        pages: defaultdict[int, dict[tuple[int, int], int]] = defaultdict(dict)
        rows, lengths = self.runner.req_states.req_id_to_index, self.runner.block_tables.num_blocks.np
        for remap in remaps:
            row = rows.get(remap.request_id)
            if row is None or remap.slot >= lengths[remap.group, row]:
                continue
            pages[remap.group][row, remap.slot] = remap.page
            if remap.request_id in self._held:
                self._held[remap.request_id][remap.group].pages[remap.slot] = remap.page
        for group, changed in pages.items():
            self._write(group, changed)

    def read(self, request_id: str, group: int, slots: int) -> list[list[int]]:
        """See `WorkerTables`."""
        row = self.runner.req_states.req_id_to_index[request_id]
        known = min(slots, int(self.runner.block_tables.num_blocks.np[group, row]))
        found = [self._table(group)[row, :known].tolist()]
        if request_id in self._held:
            held = self._held[request_id][group]
            found.append(held.pages[: min(slots, held.length)].tolist())
        return found

    def begin(self, output: Any) -> None:
        """See `WorkerTables`."""
        from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

        for request_id in output.finished_req_ids:
            self._held.pop(request_id, None)
        for new in output.scheduled_new_reqs:  # those that come back after a preemption among them
            self._held[new.req_id] = [_Row(self._table(group).shape[1]) for group in range(len(new.block_ids))]
            self._append(new.req_id, new.block_ids)
        cached = output.scheduled_cached_reqs
        for request_id, pages in zip(cached.req_ids, cached.new_block_ids, strict=True):
            self._append(request_id, pages or ())
        drafts = output.scheduled_spec_decode_tokens
        self._order = sort_batch_req_ids(output.num_scheduled_tokens, drafts, self.runner.decode_query_len)

    def batch(self, group: int) -> tuple[list[str], np.ndarray]:
        """See `WorkerTables`."""
        rows = [self._held[request_id][group].pages for request_id in self._order]
        return self._order, np.stack(rows) if rows else np.zeros((0, 0), np.int32)

    def _append(self, request_id: str, groups: Sequence[Sequence[int]]) -> None:
        for row, pages in zip(self._held[request_id], groups, strict=False):
            row.append(pages)

    def _table(self, group: int) -> torch.Tensor:
        table: torch.Tensor = self.runner.block_tables.block_tables[group].gpu
        return table

    def _write(self, group: int, pages: dict[tuple[int, int], int]) -> None:
        """Write `pages`, by row and slot, behind all that reads the table of the last step.

        Not by the table's own staged writes: they go round as many buffers as there are steps in flight, so a second
        round in a step would overwrite what the device has yet to read.
        """
        from vllm.utils.torch_utils import async_tensor_h2d

        table = self._table(group)
        with torch.inference_mode():
            entries = async_tensor_h2d([(*entry, page) for entry, page in pages.items()], table.device, torch.int64)
            rows, slots, new = entries.unbind(1)
            table[rows, slots] = new.to(table.dtype)


class _Row:
    """The table of one request and group on the host, with room for all that fits the device's."""

    def __init__(self, width: int) -> None:
        self.pages = np.zeros(width, np.int32)
        self.length = 0

    def append(self, pages: Sequence[int]) -> None:
        self.pages[self.length : self.length + len(pages)] = pages
        self.length += len(pages)
