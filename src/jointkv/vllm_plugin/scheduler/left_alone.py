"""Clients' requests that share nothing: counted by reason and logged once for each, or an idle plugin looks dead."""

from __future__ import annotations

from vllm.logger import init_logger

from jointkv.vllm_plugin.metrics import LEFT_ALONE, Statistics
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest
from jointkv.vllm_plugin.settings import PluginSettings

logger = init_logger(f"vllm.{__name__}")

ADVICE = {
    "pool_usage": "; min_pool_usage is {min_pool_usage:g}, and 0 shows on a quiet server what could be shared",
    "short": "; a block has {block_size} tokens, see --block-size",
    "prompt_logprobs": "; with the extra argument jointkv=true it takes part",
}
"""By reason of `LEFT_ALONE`, where there is something to do."""


class LeftAlone:
    """Counts them.

    Args:
        settings: what the advice is about.
        block_size: tokens per block.
        statistics: where they are counted.
    """

    def __init__(self, settings: PluginSettings, block_size: int, statistics: Statistics) -> None:
        self._settings, self._block_size, self._statistics = settings, block_size, statistics

    def count(self, reason: str | None) -> None:
        """A request shares nothing for `reason`, one of `LEFT_ALONE`; with None it does, or may yet."""
        if reason is not None and self._statistics.leave_alone(reason):
            what_to_do = ADVICE.get(reason, "").format(
                min_pool_usage=self._settings.min_pool_usage, block_size=self._block_size
            )
            logger.info("jointkv shared nothing of a request: %s%s (logged once)", LEFT_ALONE[reason], what_to_do)

    def count_ended(self, tracked: TrackedRequest) -> None:
        """A request that took part has ended; perhaps nothing of it was fused or tried."""
        self.count(passed_over(tracked, self._settings))


def passed_over(tracked: TrackedRequest, settings: PluginSettings) -> str | None:
    """Why no block of a request that took part and has ended was fused or tried, likewise; None if one was."""
    request = tracked.request
    if tracked.tried or not request.num_computed_tokens:
        return None
    if settings.isolation == "strict" and not request.cache_salt:
        return "no_salt"
    return "short" if request.num_computed_tokens < tracked.block_size else "pool_usage"
