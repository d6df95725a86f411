"""Which engines may keep pages in a store, and what their pages are known by there."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from jointkv.codec.pages import Layout
from jointkv.core.blocks import SUPPORTED_DTYPES
from jointkv.errors import UnsupportedEngine
from jointkv.policy.identity import checkpoint_fingerprint, checkpoint_folder

SAMPLED = 64
"""Numbers at either end of every weight, by which it is seen whether weights have changed."""

VOLATILE = ("_name_or_path", "transformers_version")
"""What a model's configuration says that changes nothing of its K and V."""


def check_store(config: Any, kv_cache_config: KVCacheConfig, ours: bool) -> None:
    """Whether an engine's pages can be kept in a store.

    Args:
        config: the engine's `VllmConfig`.
        ours: whether the scheduler is the plugin's.

    Raises:
        UnsupportedEngine: it cannot, by name.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    transfer, launch = config.kv_transfer_config, "start with `jointkv serve`, or take the arguments of `engine_args`"
    refusals = {
        f"{config.parallel_config.world_size} workers, each of which holds a part of every page": (
            config.parallel_config.world_size > 1,
            "use --data-parallel-size, whose engines share a store",
        ),
        f"{len(specs)} KV-cache groups": (len(specs) > 1, "its pages are those of one block table"),
        f"layers of kind {type(specs[0]).__name__}": (
            type(specs[0]) is not FullAttentionSpec,
            "its pages have K and V per head of all text before",
        ),
        f"pages of {getattr(specs[0], 'dtype', None)}": (
            getattr(specs[0], "dtype", None) not in SUPPORTED_DTYPES,
            "drop --kv-cache-dtype",
        ),
        "prefix caching switched off": (
            not config.cache_config.enable_prefix_caching,
            "drop --no-enable-prefix-caching",
        ),
        # In mixed batches vLLM's CPU kernels give requests without an adapter wrong K and V, which would outlive it.
        "adapters on a CPU, which change requests that have none": (
            config.lora_config is not None and config.device_config.device_type == "cpu",
            "drop --enable-lora",
        ),
        "vLLM's own scheduler": (not ours, launch),
        f"kv_role={transfer.kv_role}": (transfer.kv_role != "kv_both", launch),
        f"kv_load_failure_policy={transfer.kv_load_failure_policy}, by which requests fail whose pages are lost": (
            transfer.kv_load_failure_policy != "recompute",
            launch,
        ),
    }
    for name, (present, remedy) in refusals.items():
        if present:
            raise UnsupportedEngine(f"a store does not work with {name}; {remedy}, or drop store")


@torch.inference_mode()
def sample_of_weights(model: torch.nn.Module) -> bytes:
    """What changes when the weights of a loaded model do, as in training; a few milliseconds."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        numbers = weight.detach().flatten()
        ends = torch.cat((numbers[:SAMPLED], numbers[-SAMPLED:])).contiguous().cpu()
        digest.update(ends.view(torch.uint8).numpy().tobytes())
    return digest.digest()


def stored_model(config: Any, kv_cache_config: KVCacheConfig) -> str:
    """A fingerprint of all that the K and V of a text depend on: weights, configuration, and layout of pages.

    Raises:
        UnsupportedEngine: the model has no files whose weights could be told apart.
    """
    model = config.model_config
    folder = checkpoint_folder(model.model, model.revision)
    weights = None if folder is None else checkpoint_fingerprint(folder)
    if weights is None:
        raise UnsupportedEngine(
            f"a store cannot tell the weights of {model.model} from others: it has no safetensors files; drop store"
        )
    (group,) = kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    layout = Layout(
        len(group.layer_names),
        spec.block_size,
        spec.num_kv_heads,
        spec.head_size,
        spec.head_size_v,
        spec.dtype,
    )
    said = {name: value for name, value in model.hf_config.to_dict().items() if name not in VOLATILE}
    shape = [said, str(model.dtype), str(model.quantization)]
    configured = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"vllm/{weights}/{configured}/{layout.fingerprint}"
