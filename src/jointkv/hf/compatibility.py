"""What jointkv uses of transformers, and a check on import that the installed release has all of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from jointkv.errors import UnsupportedTransformers
from jointkv.system.interfaces import Use, differences

RELEASES = ">=5.16,<5.24"
"""Those that jointkv's tests were run with, as pyproject.toml has them."""

REMEDY = "Install a release that is: pip install 'jointkv[hf]'"
LAYER = "update lazy_initialization get_seq_length get_mask_sizes offload prefetch"
OPERATIONS = "update reset reorder_cache batch_select_indices batch_repeat_interleave crop"
USES = (
    Use("transformers", "DynamicCache(config) AutoModelForCausalLM AutoTokenizer AutoConfig"),
    Use("transformers.cache_utils:Cache", "layers __init__(layers) update(_,_,_) get_seq_length()"),
    Use("transformers.cache_utils:CacheLayerMixin", "is_initialized"),
    Use("transformers.cache_utils:DynamicLayer", "keys values is_initialized is_sliding"),
    Use(
        "transformers.cache_utils:DynamicSlidingWindowLayer",
        "keys values cumulative_length lazy_initialization(_,_) crop(_) reset() reorder_cache(_) "
        "batch_select_indices(_) batch_repeat_interleave(_)",
    ),
    Use("transformers:AttentionInterface", "register(_,_)"),
    Use("transformers:AttentionMaskInterface", "register(_,_)"),
    Use("transformers.integrations.sdpa_attention", "sdpa_attention_forward(_,_,_,_,_,dropout,scaling)"),
    Use("transformers.masking_utils", "sdpa_mask"),
    Use("transformers:PreTrainedModel", "get_decoder() base_model config"),
    Use("transformers:PreTrainedConfig", "get_text_config(decoder) to_dict() _attn_implementation"),
)


def check_transformers() -> None:
    """Raises `UnsupportedTransformers` unless transformers has all that is used, before anything of it is imported."""
    _refuse(USES)


def check_overrides() -> None:
    """The same for the methods of transformers that jointkv's classes replace, once those are made."""
    from jointkv.hf.cache import JointCache
    from jointkv.hf.layer import PagedCacheLayer

    _refuse(
        (
            Use("transformers.cache_utils:CacheLayerMixin", "", LAYER, by=PagedCacheLayer),
            Use("transformers.cache_utils:Cache", "", OPERATIONS, by=JointCache),
        )
    )


def check_release() -> None:
    """Raises `UnsupportedTransformers` unless the release was run.

    What its models call their arguments, and what they do with a cache, no look at interfaces tells.
    """
    from packaging.specifiers import SpecifierSet  # comes with transformers

    version = importlib.import_module("transformers").__version__
    if not SpecifierSet(RELEASES).contains(version, prereleases=True):
        raise UnsupportedTransformers(
            f"transformers {version} was never run with jointkv, which works with {RELEASES}. {REMEDY}"
        )


def _refuse(uses: Iterable[Use]) -> None:
    transformers = importlib.import_module("transformers")  # where it is missing, its name is all there is to say
    found = differences(uses)
    if found:
        raise UnsupportedTransformers(
            f"transformers {transformers.__version__} is not what jointkv was written for: {'; '.join(found)}. {REMEDY}"
        )
