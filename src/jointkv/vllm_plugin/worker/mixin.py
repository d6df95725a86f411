"""What the plugin adds to vLLM's workers, whatever the device."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.kv_cache_interface import KVCacheSpec

from jointkv.errors import UnsupportedEngine
from jointkv.vllm_plugin.engine.check import check_connectors
from jointkv.vllm_plugin.engine.groups import split_layers
from jointkv.vllm_plugin.engine.opt_out import without_check
from jointkv.vllm_plugin.engine.others import connectors, ours
from jointkv.vllm_plugin.messages import Inquiry
from jointkv.vllm_plugin.settings import PluginSettings


class RemappingWorker:
    """Mixed into vLLM's workers: nothing in vLLM itself replaces a block of a running request."""

    model_runner: Any
    vllm_config: Any

    def settings(self) -> PluginSettings | None:
        """The plugin's, or None where the engine was started without its connector."""
        own = [each for each in connectors(self.vllm_config.kv_transfer_config) if each.is_ours]
        return PluginSettings.parse(dict(own[0].options)) if own else None

    def init_device(self) -> None:
        """Make the model runner, without what is for requests that arrive."""
        model = self.vllm_config.model_config
        model.logits_processors = without_check(model.logits_processors)
        super().init_device()  # type: ignore[misc]

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """What every layer keeps, which is also what vLLM groups layers by.

        Raises:
            UnsupportedEngine: the layers cannot be split into as many groups as the settings say.
        """
        specs = super().get_kv_cache_spec()  # type: ignore[misc]
        settings = self.settings()
        if settings is None:
            return specs  # refused later, see `initialize_from_config`
        groups = settings.layer_groups
        if groups > 1 and self.vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            raise UnsupportedEngine(
                f"layer_groups={groups} needs several block tables; drop --disable-hybrid-kv-cache-manager, or set "
                "layer_groups=1"
            )
        return split_layers(specs, groups)

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """Allocate the KV cache, then let the connector read its layout.

        Raises:
            UnsupportedEngine: see `check_connectors`.
            LayoutError: see `WorkerSide`.
        """
        check_connectors(self.vllm_config)
        result = super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        ours(get_kv_transfer_group()).attach(self.model_runner)
        return result

    def execute_model(self, scheduler_output: Any) -> Any:
        """Replace table entries, then run the step. vLLM warms up by steps of its own, with the connector put away."""
        if has_kv_transfer_group():
            side = ours(get_kv_transfer_group()).worker
            with side.tables.between_steps():
                side.apply(Inquiry.among(scheduler_output.kv_connector_metadata))
                side.follow(scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]
