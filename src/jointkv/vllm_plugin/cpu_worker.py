"""vLLM's CPU worker with remapping. Chosen by `--worker-cls`."""

from __future__ import annotations

import contextlib
from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker

from jointkv.interfaces import differences
from jointkv.vllm_plugin.interfaces import CPU_ATTENTION
from jointkv.vllm_plugin.worker import RemappingWorker

logger = init_logger(f"vllm.{__name__}")


class JointCPUWorker(RemappingWorker, CPUWorker):
    """vLLM's CPU worker, which takes committed remaps into its block tables before every step."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, with attention that can read shared pages once where the settings ask for it."""
        with self._attention():
            super().load_model(*args, **kwargs)

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        settings = self.settings()
        if settings is None or not settings.shares_reading:
            return contextlib.nullcontext()
        changed = differences(CPU_ATTENTION)
        if changed:
            logger.warning("vLLM's attention is not what jointkv was written for: %s", "; ".join(changed))
            return contextlib.nullcontext()
        from jointkv.vllm_plugin.cpu_attention import registered

        return registered()
