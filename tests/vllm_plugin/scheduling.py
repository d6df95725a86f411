"""vLLM's own requests, tables and steps, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from jointkv.vllm_plugin.messages import COSINES, ERRORS, Inquiry, Verdict

BLOCK = 32
TOKENS = list(range(10, 10 + 4 * BLOCK))

Identity = dict[str, Any]

init_none_hash(sha256)


def new_request(identity: Identity, name: str = "request", extra: dict[str, Any] | None = None, **more: Any) -> Request:
    """vLLM's own object, as the scheduler gets it."""
    adapter = identity.get("adapter")
    features = [
        MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset, length))
        for identifier, offset, length in identity.get("media", ())
    ]
    arguments: dict[str, Any] = {"prompt_token_ids": TOKENS, **more}
    return Request(
        name,
        sampling_params=SamplingParams(max_tokens=8, extra_args=extra),
        pooling_params=None,
        mm_features=features,
        lora_request=adapter and LoRARequest(*adapter),
        cache_salt=identity.get("salt"),
        block_hasher=get_request_block_hasher(BLOCK, sha256),
        **arguments,
    )


def new_manager(pages: int = 100, prefix_caching: bool = True) -> KVCacheManager:
    """Tables of one layer group over a pool of `pages`."""
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    config = KVCacheConfig(pages + 1, [], [KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(config, 4096, BLOCK, BLOCK, max_in_flight_tokens=4096, enable_caching=prefix_caching)


def start(manager: KVCacheManager, request: Request) -> Any:
    """Give `request` pages for its prompt; what a scheduler's output says of it."""
    assert manager.allocate_slots(request, request.num_tokens - request.num_computed_tokens) is not None
    request.status = RequestStatus.RUNNING
    return SimpleNamespace(
        req_id=request.request_id, block_ids=manager.get_block_ids(request.request_id), num_computed_tokens=0
    )


def step_of(
    started: Sequence[Any] = (),
    tokens: dict[str, int] | None = None,
    running: Sequence[tuple[str, list[int] | None, int]] = (),
    resumed: Sequence[str] = (),
) -> Any:
    """A scheduler's output.

    Args:
        started: from `start`.
        tokens: scheduled, by request; all of its pages for one that has started.
        running: request, new pages and computed tokens of those that go on.
        resumed: which of them come back.
    """
    names, pages, computed = zip(*running, strict=True) if running else ((), (), ())
    return SimpleNamespace(
        num_scheduled_tokens=tokens or {new.req_id: len(new.block_ids[0]) * BLOCK for new in started},
        scheduled_new_reqs=list(started),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(names),
            new_block_ids=[None if new is None else (new,) for new in pages],
            num_computed_tokens=list(computed),
            resumed_req_ids=set(resumed),
        ),
        new_block_ids_to_zero=None,
    )


def verdict_on(inquiry: Inquiry, error: float = 0.0) -> Verdict:
    """All pairs of `inquiry` are `error` apart."""
    pairs = len(inquiry.group)
    return Verdict(
        inquiry.step,
        *torch.full((len(ERRORS), pairs), error).numpy(),
        *torch.ones(len(COSINES), pairs).numpy(),
    )
