"""Requests that wait for text that another one is computing right now, instead of computing it as well."""

from __future__ import annotations

from vllm.v1.request import RequestStatus

from jointkv.core.reuse import Integers, stretches
from jointkv.vllm_plugin.scheduler.requests import Requests, TrackedRequest

SHARE = 0.5
"""Of a prompt's blocks, how many another request must be computing for it to be worth the wait: all of its steps are
steps in which both would compute the same."""


class Followers:
    """Who waits for whom.

    Args:
        requests: those that take part.

    Attributes:
        held: names of those who wait in this step.
    """

    def __init__(self, requests: Requests) -> None:
        self.held: set[str] = set()
        self._requests = requests
        self._donors: dict[str, tuple[TrackedRequest, Integers]] = {}
        """With the hashes of their prompts' blocks."""

    def new_step(self) -> None:
        """Nobody is held yet; who has computed its prompt, has gone or waits in line is nobody's donor any more."""
        self.held.clear()
        self._donors = {name: donor for name, donor in self._donors.items() if self._computes(name, donor[0])}

    def add_donor(self, tracked: TrackedRequest) -> None:
        """`tracked` computes its prompt from this step on, if nothing but the pool can keep it from it."""
        if tracked.request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            blocks = tracked.request.num_prompt_tokens // tracked.block_size
            self._donors[tracked.request.request_id] = tracked, tracked.hashes(blocks)[:blocks]

    def follows(self, tracked: TrackedRequest, end: int, resident: int) -> bool:
        """Whether `tracked` is held, because most of its blocks before `end` are being computed.

        Args:
            resident: blocks of the longest run that is resident by now.
        """
        name, text = tracked.request.request_id, tracked.hashes(end)[:end]
        for donor, its in self._donors.values():
            if donor.isolation != tracked.isolation or donor is tracked:
                continue
            blocks = min(end, len(its))
            same = text[:blocks] == its[:blocks]
            # What is equal from the first token on vLLM's own prefix cache shares in the same step.
            coming = max((len(stretch) for stretch in stretches(same) if stretch.start), default=0)
            if coming >= SHARE * end and coming > resident + 1:
                self._donors.pop(name, None)  # or two could wait for each other
                self.held.add(name)
                return True
        return False

    def start_anew(self) -> None:
        """Let everybody go."""
        self.held, self._donors = set(), {}

    def _computes(self, name: str, donor: TrackedRequest) -> bool:
        runs = self._requests.active.get(name) is donor and donor.request.status == RequestStatus.RUNNING
        return runs and donor.request.num_computed_tokens < donor.request.num_prompt_tokens
