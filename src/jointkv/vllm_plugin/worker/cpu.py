"""vLLM's CPU worker with remapping. Chosen by `--worker-cls`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from jointkv.vllm_plugin.attention.install import chosen
from jointkv.vllm_plugin.worker.mixin import RemappingWorker


class JointCPUWorker(RemappingWorker, CPUWorker):
    """vLLM's CPU worker, which takes committed remaps into its block tables before every step."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, with attention that can read shared pages once where the settings ask for it."""
        with chosen(self.settings(), "cpu", self._attention):
            super().load_model(*args, **kwargs)

    def _attention(self) -> AbstractContextManager[None]:
        from jointkv.vllm_plugin.attention.cpu import registered

        return registered()
