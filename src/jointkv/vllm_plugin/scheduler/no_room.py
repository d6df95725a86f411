"""A request for which nothing is found, and no room either: looked up now and then instead of in every step."""

from __future__ import annotations

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from jointkv.vllm_plugin.engine.line import whole_prompts
from jointkv.vllm_plugin.engine.tables import BlockTables

LOOKS_AGAIN = 8
"""Steps after which it is looked up anew: others may have computed its text, and it takes less then."""


class NoRoom:
    """The first such request in the line; vLLM looks at nobody behind it.

    Args:
        tables: vLLM's.
    """

    def __init__(self, tables: BlockTables) -> None:
        self._tables, self._name, self._steps = tables, "", 0

    def begins(self, request: Request, scheduler: Scheduler) -> bool:
        """Whether `request`, for which nothing was found in this step, is it."""
        fits = self._fits(request, scheduler)
        if not fits:
            self._name, self._steps = request.request_id, LOOKS_AGAIN
        return not fits

    def goes_on(self, request: Request, scheduler: Scheduler) -> bool:
        """Whether `request` is it since a few steps, and is not to be looked up; to be asked once a step."""
        if request.request_id != self._name or not self._steps:
            return False
        self._steps -= 1
        return not self._fits(request, scheduler)

    def _fits(self, request: Request, scheduler: Scheduler) -> bool:
        """Whether `request`, of which nothing but exact prefixes is found, may have room to start."""
        whole = whole_prompts(scheduler)
        needed = self._tables.needed(request, self._tables.found_pages(request)) if whole else 1
        return needed <= self._tables.free
