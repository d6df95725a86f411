"""The block tables of vLLM's first model runner."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from jointkv.system.interfaces import Use
from jointkv.vllm_plugin.engine.runners.base import Remap, WorkerTables

WORKER = "vllm.v1.worker"


class V1Tables(WorkerTables):
    """Tables of requests, and rows of the batch that is kept from step to step."""

    USES = (
        Use(f"{WORKER}.gpu_model_runner:GPUModelRunner", "requests input_batch synchronize_input_prep()"),
        Use(f"{WORKER}.gpu_input_batch:CachedRequestState", "block_ids"),
        Use(f"{WORKER}.gpu_input_batch:InputBatch", "req_ids req_id_to_index block_table"),
        Use(f"{WORKER}.block_table:MultiGroupBlockTable", "__getitem__(_)"),
        Use(f"{WORKER}.block_table:BlockTable", "block_table block_size"),
        Use("vllm.v1.utils:CpuGpuBuffer", "np"),
    )

    def between_steps(self) -> AbstractContextManager[Any]:
        """See `WorkerTables`."""
        return self.runner.synchronize_input_prep()  # type: ignore[no-any-return]

    def block_size(self, group: int) -> int:
        """See `WorkerTables`."""
        return int(self.runner.input_batch.block_table[group].block_size)

    def replace(self, remaps: Sequence[Remap]) -> None:
        """See `WorkerTables`."""
        for remap in remaps:
            request = self.runner.requests.get(remap.request_id)
            if request is None or remap.slot >= len(request.block_ids[remap.group]):
                continue
            request.block_ids[remap.group][remap.slot] = remap.page
            row = self.runner.input_batch.req_id_to_index.get(remap.request_id)
            if row is not None:
                self._rows(remap.group)[row, remap.slot] = remap.page

    def read(self, request_id: str, group: int, slots: int) -> list[list[int]]:
        """See `WorkerTables`."""
        row = self.runner.input_batch.req_id_to_index[request_id]
        return [self.runner.requests[request_id].block_ids[group], self._rows(group)[row, :slots].tolist()]

    def begin(self, output: Any) -> None:
        """See `WorkerTables`. The runner keeps its tables on the host."""

    def batch(self, group: int) -> tuple[list[str], np.ndarray]:
        """See `WorkerTables`."""
        names = self.runner.input_batch.req_ids
        return names, self._rows(group)[: len(names)]

    def _rows(self, group: int) -> np.ndarray:
        rows: np.ndarray = self.runner.input_batch.block_table[group].block_table.np
        return rows
