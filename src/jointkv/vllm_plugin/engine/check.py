"""Which engines the plugin may be attached to, checked at start: refuse by name, and say what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SlidingWindowSpec,
)

from jointkv.core.moved_text import check_block_size
from jointkv.errors import InvalidPolicy, UnsupportedEngine
from jointkv.fusion.signature_index import SignatureIndex
from jointkv.policy import LayerGroups
from jointkv.policy.identity import ModelIdentity, checkpoint_fingerprint, checkpoint_folder
from jointkv.vllm_plugin import SCHEDULER
from jointkv.vllm_plugin.engine.groups import LayerGroupSpec
from jointkv.vllm_plugin.engine.others import STORES_FOR_ALL, connectors, refused
from jointkv.vllm_plugin.engine.scheduler import JointScheduler
from jointkv.vllm_plugin.engine.stored import check_store
from jointkv.vllm_plugin.engine.uses import check_interfaces, check_version
from jointkv.vllm_plugin.settings import PluginSettings

SPECULATORS = (None, "ngram")
"""Methods of speculative decoding that were run; others keep K and V of drafts in layers of their own."""


SIGNATURES_PART = 0.1
"""Of the machine's memory, for the signatures of resident pages at the most."""


class ReuseObstacle(NamedTuple):
    """What keeps an engine from reuse.

    Attributes:
        reason: one of `metrics.NO_REUSE`.
        why: in words.
        remedy: what to do, if there is anything.
    """

    reason: str
    why: str
    remedy: str = ""


BESIDE_OTHERS = ReuseObstacle("connectors", STORES_FOR_ALL)


def check_engine(
    config: Any, kv_cache_config: KVCacheConfig, settings: PluginSettings, parts: Mapping[str, type]
) -> tuple[int, ...]:
    """The numbers of the KV-cache groups that take part.

    Args:
        config: the engine's `VllmConfig`.
        parts: see `check_interfaces`.

    Raises:
        UnsupportedEngine: the engine lacks what the plugin uses of it, is set up in a way that was not written for,
            or (unless `settings.allow_untested`) never run.
        InvalidPolicy: layer groups do not separate the layers that are left out.
        ModelMismatch, BadInput: the profile belongs to another model, or to blocks of another size.
    """
    check_interfaces(parts)
    _check_setup(config, settings)
    worker = config.parallel_config.worker_cls
    if not issubclass(resolve_obj_by_qualname(worker), parts["worker"]):
        raise UnsupportedEngine(
            f"the worker is {worker}, which cannot replace blocks of running requests; start with `jointkv serve`, or "
            "add --worker-cls jointkv.vllm_plugin.worker.cpu.JointCPUWorker"
        )
    if settings.reuse != "auto" and settings.reuses:
        obstacle = reuse_obstacle(config, kv_cache_config)
        if obstacle is not None:
            raise UnsupportedEngine(f"{obstacle.why}; {obstacle.remedy}set reuse=off")
    if settings.store is not None:
        check_store(config, kv_cache_config, _has_our_scheduler(config))
    if settings.writes_directions and not _has_our_scheduler(config):
        raise UnsupportedEngine(
            "directions=written needs jointkv's own scheduler, or pages that are held keep vLLM from emptying its "
            f"prefix cache; start with `jointkv serve`, add --scheduler-cls {SCHEDULER}, or set directions=off"
        )
    if not settings.allow_untested:
        _check_tested(config)
    groups = tuple(
        number for number, group in enumerate(kv_cache_config.kv_cache_groups) if _can_fuse(group.kv_cache_spec)
    )
    if not groups:
        raise UnsupportedEngine("no layer of this model has full attention; serve it without jointkv")
    block_size, *others = (kv_cache_config.kv_cache_groups[number].kv_cache_spec.block_size for number in groups)
    if any(other != block_size for other in others):
        raise UnsupportedEngine(f"full-attention layers with block sizes {block_size} and {others} were never run")
    if settings.scope != "batch" and settings.chunk_tokens % block_size:
        raise UnsupportedEngine(
            f"chunk_tokens={settings.chunk_tokens} is not a multiple of the engine's block size {block_size}"
        )
    if settings.moved:
        _check_moved(kv_cache_config, groups)
    if settings.layer_groups != len(groups):
        raise UnsupportedEngine(
            f"layer_groups={settings.layer_groups}, but the engine keeps {len(groups)} block tables for full "
            f"attention; set layer_groups={len(groups)}"
        )
    profile = settings.load_profile()
    if profile is not None:
        layers = _layers(kv_cache_config, groups)
        if config.parallel_config.pipeline_parallel_size > 1 and layers < profile.model.layers:
            layers = profile.model.layers  # a stage knows of its own alone, but its checkpoint is that of all
        profile.check(_model_identity(config.model_config, layers), block_size)
    if settings.signs:
        _check_signatures(settings, kv_cache_config.num_blocks)
    return _taking_part(settings, kv_cache_config, groups)


def _layers(kv_cache_config: KVCacheConfig, groups: tuple[int, ...]) -> int:
    return sum(len(kv_cache_config.kv_cache_groups[number].layer_names) for number in groups)


def _taking_part(settings: PluginSettings, kv_cache_config: KVCacheConfig, groups: tuple[int, ...]) -> tuple[int, ...]:
    """Those of `groups` whose layers are not left out. Raises InvalidPolicy where a group has layers of both kinds."""
    policy = settings.fusion_policy()
    if not policy.enabled or not (policy.skip_first_layers or policy.skip_last_layers):
        return groups
    fused = LayerGroups.of(policy, _layers(kv_cache_config, groups)).fused
    if not any(fused):
        raise UnsupportedEngine(
            f"skip_first_layers={policy.skip_first_layers} and skip_last_layers={policy.skip_last_layers} leave no "
            "layer; lower them"
        )
    return tuple(number for number, takes_part in zip(groups, fused, strict=True) if takes_part)


def _check_moved(kv_cache_config: KVCacheConfig, groups: tuple[int, ...]) -> None:
    """Raises UnsupportedEngine where pages cannot be written with text that moved; of keys see `rotary_of`."""
    for spec in (kv_cache_config.kv_cache_groups[number].kv_cache_spec for number in groups):
        if isinstance(spec, MLAAttentionSpec):
            raise UnsupportedEngine("moved=true was not written for latent attention (MLA); drop it")
        if spec.dtype.itemsize == 1:
            raise UnsupportedEngine(
                "moved=true turns keys, and those of fp8 pages would be rounded again; drop it, or --kv-cache-dtype"
            )
        try:
            check_block_size(spec.block_size)
        except InvalidPolicy as error:
            raise UnsupportedEngine(f"{error}; set --block-size, or drop moved=true") from None


def _check_signatures(settings: PluginSettings, pages: int) -> None:
    """Raises UnsupportedEngine where signatures of all pages could take more than their part of the memory."""
    needed, memory = SignatureIndex.most_bytes(settings.signature_size, pages), psutil.virtual_memory().total
    if needed > SIGNATURES_PART * memory:
        raise UnsupportedEngine(
            f"signature_size={settings.signature_size}: signatures of {pages} pages can take {needed / 2**30:.1f} GiB, "
            f"more than {SIGNATURES_PART:.0%} of this machine's {memory / 2**30:.1f}; lower it, raise --block-size, or "
            "set candidates=tokens"
        )


def _model_identity(config: Any, layers: int) -> ModelIdentity:
    folder = checkpoint_folder(config.model, config.revision)
    return ModelIdentity(
        name=Path(config.model).name,
        layers=layers,
        kv_heads=config.get_total_num_kv_heads(),
        head_size=config.get_head_size(),
        checkpoint=None if folder is None else checkpoint_fingerprint(folder),
    )


def _check_setup(config: Any, settings: PluginSettings) -> None:
    parallel = config.parallel_config
    speculative = config.speculative_config
    method = None if speculative is None else speculative.method
    refusals = {
        f"speculative decoding by {method}": (
            method not in SPECULATORS,
            "use the method ngram, which keeps no K and V of its own, or drop --speculative-config",
        ),
        "layer groups in several pipeline stages, each of which would split its own layers": (
            parallel.pipeline_parallel_size > 1 and settings.layer_groups > 1,
            "set layer_groups=1, or use --tensor-parallel-size instead",
        ),
        "context parallelism": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "set the context parallel sizes to 1",
        ),
        "a sharing of KV between layers": (
            config.cache_config.kv_sharing_fast_prefill,
            "drop --kv-sharing-fast-prefill",
        ),
    }
    for name, (present, remedy) in refusals.items():
        if present:
            raise UnsupportedEngine(f"jointkv does not work with {name}; {remedy}, or serve without jointkv")


def check_connectors(config: Any) -> None:
    """Raises UnsupportedEngine unless the plugin's connector is there, once, alone or among others that may be.

    Args:
        config: the engine's `VllmConfig`; a connector among several sees of them itself alone.
    """
    found = connectors(config.kv_transfer_config)
    if sum(each.is_ours for each in found) != 1:
        raise UnsupportedEngine(
            "the jointkv worker runs without the jointkv connector, or with several of it; start with `jointkv serve`, "
            "give the flags of `jointkv serve --dry-run`, or take the arguments of `engine_args`"
        )
    if refused(found):
        raise UnsupportedEngine(
            f"jointkv does not work beside {refused(found)}; leave it out, or serve without jointkv"
        )
    if len(found) > 1 and not _has_our_scheduler(config):
        raise UnsupportedEngine(
            "beside other connectors jointkv needs its own scheduler; take the arguments of `engine_args(beside=...)`, "
            f"or add --scheduler-cls {SCHEDULER}"
        )


def _scheduler(config: Any) -> type | None:
    """The scheduler class that was asked for; None for vLLM's own."""
    named = config.scheduler_config.scheduler_cls
    return resolve_obj_by_qualname(named) if isinstance(named, str) else named


def _has_our_scheduler(config: Any) -> bool:
    scheduler = _scheduler(config)
    return scheduler is not None and issubclass(scheduler, JointScheduler)


def reuse_obstacle(config: Any, kv_cache_config: KVCacheConfig) -> ReuseObstacle | None:
    """What keeps the engine from reuse, however the plugin is set; arguments as of `check_engine`."""
    found = _scheduler(config)
    if found is None or not issubclass(found, JointScheduler):
        name = "vLLM's own" if found is None else f"{found.__module__}.{found.__qualname__}"
        return ReuseObstacle(
            "scheduler",
            f"the scheduler is {name}, which sends no helpers ahead",
            "start with `jointkv serve` and without --scheduler-cls, take the arguments of `engine_args`, or ",
        )
    if not config.cache_config.enable_prefix_caching:
        return ReuseObstacle(
            "prefix_caching", "reuse finds pages by vLLM's prefix cache", "drop --no-enable-prefix-caching, or "
        )
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    if len(specs) == 1:
        return None
    why = f"reuse works with one KV-cache group, and this model has {len(specs)}"
    if any(isinstance(spec, MambaSpec) for spec in specs):
        why = "reuse leaves text out, and the state of recurrent layers is that of all text before"
    elif any(isinstance(spec, SlidingWindowSpec | RSWASpec) for spec in specs):
        why = "reuse needs the pages of a whole text, and those of sliding windows are given back behind the window"
    return ReuseObstacle("kv_cache_groups", why)


def _check_tested(config: Any) -> None:
    check_version()
    device = config.device_config.device_type
    if device != "cpu":
        raise UnsupportedEngine(
            f"jointkv was never run on {device}; the code is written for it, set allow_untested to try"
        )


def _can_fuse(spec: KVCacheSpec) -> bool:
    """Full attention is fused; windows and recurrent states, which come and go, are left alone; others are refused."""
    if type(spec) in (FullAttentionSpec, LayerGroupSpec, MLAAttentionSpec):
        return True
    if isinstance(spec, SlidingWindowSpec | RSWASpec | MambaSpec):
        return False
    raise UnsupportedEngine(f"KV-cache layers of kind {type(spec).__name__} were never run with jointkv")
