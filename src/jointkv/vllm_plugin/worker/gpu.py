"""vLLM's GPU worker with remapping. Chosen by `--worker-cls`. Written to the same interfaces; never run so far."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from jointkv.errors import UnsupportedEngine
from jointkv.vllm_plugin.attention.install import chosen
from jointkv.vllm_plugin.worker.mixin import RemappingWorker

logger = init_logger(f"vllm.{__name__}")


class JointGPUWorker(RemappingWorker, Worker):
    """vLLM's GPU worker, which takes committed remaps into its block tables before every step."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, with attention that can read shared pages once where the settings ask for it.

        Raises:
            UnsupportedEngine: the settings ask for a measurement of it.
        """
        settings = self.settings()
        if settings is not None and settings.enabled and settings.attention == "auto" and not settings.own_norms:
            # It would be timed against vLLM's Triton attention, which is not what vLLM takes without the plugin.
            raise UnsupportedEngine(
                "attention=auto is there for CPUs only: on a GPU nothing measures which attention is faster; "
                "set attention=shared or attention=engine"
            )
        with chosen(settings, "gpu", self._attention):
            super().load_model(*args, **kwargs)

    def _attention(self) -> AbstractContextManager[None]:
        from jointkv.vllm_plugin.attention.gpu import registered, unsupported

        reason = unsupported(self.vllm_config)
        if reason is not None:
            logger.warning("attention stays vLLM's: reading shared pages once was not written for %s", reason)
            return nullcontext()
        return registered(self.vllm_config)
