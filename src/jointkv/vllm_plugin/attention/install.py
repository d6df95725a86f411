"""Putting attention that reads shared pages once in the place of vLLM's: as a model is loaded, and over its pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import KVCacheConfig

from jointkv.attention.layouts import LayerPages
from jointkv.errors import LayoutError
from jointkv.system.interfaces import differences
from jointkv.vllm_plugin.attention.backend import JointAttention, JointBuilder
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.attention.reading import SharedReading
from jointkv.vllm_plugin.engine.pages import PROBED_PAGE
from jointkv.vllm_plugin.engine.runners.base import WorkerTables
from jointkv.vllm_plugin.engine.uses import used
from jointkv.vllm_plugin.settings import PluginSettings

logger = init_logger(f"vllm.{__name__}")


def chosen(
    settings: PluginSettings | None, device: str, register: Callable[[], AbstractContextManager[None]]
) -> AbstractContextManager[None]:
    """What a worker loads its model in: `register()` where `settings` ask for it and vLLM has what it uses."""
    if settings is None or not (settings.enabled and settings.shares_reading):
        return nullcontext()
    found = changed(device)
    if found:
        logger.warning("vLLM's attention is not what jointkv was written for: %s", "; ".join(found))
        return nullcontext()
    return register()


def changed(device: str) -> list[str]:
    """What vLLM lacks of what is used on `device`, or calls otherwise of what is mixed into it; see `differences`."""
    mixed = {"forward": JointAttention, "build": JointBuilder}
    return differences(
        replace(use, by=mixed[use.overridden]) if use.overridden else use for use in used().ATTENTION[device]
    )


@contextmanager
def override(name: str, backend: type) -> Iterator[None]:
    """Register `backend` over `name` of vLLM's `AttentionBackendEnum`, and undo it: other engines are left alone."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    member = AttentionBackendEnum[name]
    before = member.get_path() if member.is_overridden() else None
    register_backend(member, f"{backend.__module__}.{backend.__qualname__}")
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        member.clear_override()
        if before is not None:
            register_backend(member, before)
        selector._cached_get_attn_backend.cache_clear()


def share_reading(
    tables: WorkerTables, config: KVCacheConfig, groups: Sequence[int], settings: PluginSettings
) -> tuple[dict[int, SharedReading], OwnNorms | None]:
    """Let the layers of KV-cache `groups`, whose caches are bound and unused, read shared pages once.

    Args:
        tables: of the worker's model runner; attention of its layers is changed.
        config: of the KV cache, as the connector was given it.
        groups: by number.

    Returns:
        What the layers of each group share, and the norms of blocks where the settings ask for them.

    Raises:
        LayoutError: a layer's attention has something that the kernel was not written for.
        NativeUnavailable: there is no kernel: no compiler, or no Triton. Nothing has changed after either.
    """
    runner = tables.runner
    if runner.parallel_config.use_ubatching:
        raise LayoutError("shared-page attention was not written for batches that are cut in two")
    layers = {number: _layers(runner, config, number) for number in groups}
    pages = {number: [_pages(layer) for layer in held] for number, held in layers.items()}
    batches = runner.vllm_config.max_concurrent_batches
    norms = OwnNorms(max(map(len, layers.values())), batches) if settings.own_norms else None
    timed = settings.attention == "auto" and not settings.own_norms
    readings = {}
    for number, held in layers.items():
        impl: JointAttention = held[0].impl
        first = pages[number][0]
        impl.prepare(first)
        switch = impl.measured(held[0], first, runner.max_model_len) if timed else None
        group = impl.num_heads // impl.num_kv_heads
        readings[number] = SharedReading(tables, number, first, group, impl.threads(first), switch, norms)
        logger.info(
            "shared pages are read once for all requests%s", "" if switch is None else f" where it pays: {switch}"
        )
    for number, held in layers.items():
        for place, layer in enumerate(held):
            layer.impl.pages, layer.impl.place, layer.impl.reading = pages[number][place], place, readings[number]
    return readings, norms


def _layers(runner: Any, config: KVCacheConfig, number: int) -> list[Any]:
    """The layers of a group. Raises `LayoutError` where others read its pages too, or not all of its tokens."""
    group = config.kv_cache_groups[number]
    if runner.kv_cache_config.kv_cache_groups[number].layer_names != group.layer_names:
        raise LayoutError("other layers read the K and V of this group as well")
    if getattr(group.kv_cache_spec, "attention_chunk_size", None) is not None:
        raise LayoutError("shared-page attention was not written for chunked local attention")
    known = runner.compilation_config.static_forward_context
    layers = [known[name] for name in group.layer_names]
    if len({(layer.impl.num_heads, layer.impl.num_kv_heads) for layer in layers}) > 1:
        raise LayoutError("the layers of a group differ in their numbers of heads")
    return layers


def _pages(layer: Any) -> LayerPages:
    """Raises `LayoutError` unless the kernel computes what `layer` asks for, from pages as it believes them to be."""
    if not isinstance(layer.impl, JointAttention):
        raise LayoutError(f"{type(layer.impl).__name__} is not the attention of this plugin")
    impl: Any = layer.impl
    special = {
        "a sliding window": impl.sliding_window not in (-1, (-1, -1)),
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap": impl.logits_soft_cap != 0,
        "attention sinks": impl.sinks is not None,
        "attention that is not causal": impl.attn_type != AttentionType.DECODER,
        **impl.special(layer),
    }
    for name, there in special.items():
        if there:
            raise LayoutError(f"shared-page attention was not written for {name}")
    pages = impl.layout(layer)
    pages.confirm(
        lambda *written: impl.do_kv_cache_update(layer, *written[:2], layer.kv_cache, written[2]), PROBED_PAGE
    )
    return pages
