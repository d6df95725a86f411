"""What requests that start or come back find in the prefix cache, apart from what is loaded beside it.

vLLM says both as one number once a request is in a step: there everything is computed.
"""

from __future__ import annotations

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from jointkv.vllm_plugin.engine.steps import started


class Arrivals:
    """Remembers it from the look-up of a request to the step in which it starts."""

    def __init__(self) -> None:
        self._looked_up: dict[str, int] = {}
        self._allocated: dict[str, int] = {}

    def look_up(self, request_id: str, computed: int) -> None:
        """A request would find `computed` tokens now."""
        self._looked_up[request_id] = computed

    def allocate(self, request: Request) -> int:
        """`request` has got its pages: tokens that it has found."""
        found = self._looked_up.pop(request.request_id, None)
        if found is None:  # what was loaded is there, and the request goes on
            return request.num_computed_tokens
        self._allocated[request.request_id] = found
        return found

    def take_loaded(self, output: SchedulerOutput) -> dict[str, int]:
        """Tokens found by those who start in the step that `output` describes and are told of more; once."""
        names = {name: (self._allocated.pop(name, computed), computed) for name, computed in started(output)}
        return {name: found for name, (found, computed) in names.items() if found < computed}

    def dismiss(self, request_id: str) -> None:
        """A request has ended."""
        for known in (self._looked_up, self._allocated):
            known.pop(request_id, None)
