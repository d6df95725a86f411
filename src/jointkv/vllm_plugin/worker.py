"""What the plugin adds to vLLM's workers, whatever the device."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from jointkv.errors import UnsupportedEngine


class RemappingWorker:
    """Mixed into vLLM's workers: nothing in vLLM itself replaces a block of a running request."""

    model_runner: Any

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """Allocate the KV cache, then let the connector read its layout."""
        from jointkv.vllm_plugin.connector import JointConnector

        result = super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        connector = get_kv_transfer_group() if has_kv_transfer_group() else None
        if not isinstance(connector, JointConnector):
            raise UnsupportedEngine(
                "the jointkv worker runs without the jointkv connector; start with `jointkv serve`, or give "
                "--kv-transfer-config as the README says, with no other connector"
            )
        connector.attach(self.model_runner)
        return result

    def execute_model(self, scheduler_output: Any) -> Any:
        """Replace table entries, then run the step."""
        connector = get_kv_transfer_group()
        with self.model_runner.synchronize_input_prep():
            connector.apply(scheduler_output.kv_connector_metadata)
        return super().execute_model(scheduler_output)  # type: ignore[misc]
