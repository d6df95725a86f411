"""Helpers: ordinary requests that nobody sees, which compute the gaps of those that reuse, or load a prefix."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from vllm.v1.request import Request, RequestStatus

from jointkv.vllm_plugin.engine.line import helper_of
from jointkv.vllm_plugin.engine.opt_out import OPT_OUT
from jointkv.vllm_plugin.scheduler.intake import Helper, Intake


class Helpers:
    """Those that have been sent.

    Attributes:
        of_name: by name. Ended ones stay until `forget_ended`.
    """

    def __init__(self) -> None:
        self.of_name: dict[str, Helper] = {}
        self._number = 0

    def of(self, request_ids: Iterable[str]) -> list[str]:
        """Those that have not ended, of these requests."""
        owners = set(request_ids)
        return [name for name, helper in self.of_name.items() if helper.owner in owners and not helper.ended]

    def make(self, intake: Intake, hash_block_size: int) -> Iterator[Helper]:
        """One for each gap of `intake` that is to be computed next."""
        for end in intake.gap_ends:
            tokens = end * intake.tracked.block_size
            helper = self._make("gap", intake.tracked.request, tokens, hash_block_size, end)
            intake.covered = end
            intake.helpers.add(helper.request.request_id)
            yield helper

    def loader_of(self, request: Request, tokens: int, hash_block_size: int) -> Helper:
        """One that brings the first `tokens` of `request`, all of which but the last are loaded."""
        return self._make("load", request, tokens, hash_block_size, tokens // hash_block_size)

    def let_go(self, owner: str) -> None:
        """Nobody waits for those of `owner` any more."""
        for helper in self.of_name.values():
            helper.stray = helper.stray or helper.owner == owner

    def stray(self, owners: Collection[str]) -> list[str]:
        """Those that nobody waits for; `owners` are requests on their way in."""
        # One that was preempted after its request has found everything would compute it again.
        return [
            name
            for name, helper in self.of_name.items()
            if not helper.ended
            and (helper.stray or (helper.owner not in owners and helper.request.status != RequestStatus.RUNNING))
        ]

    def forget_ended(self) -> None:
        """Those that have ended are no longer known: nothing of them is on its way to a client."""
        self.of_name = {name: helper for name, helper in self.of_name.items() if not helper.ended}

    def _make(self, what: str, request: Request, tokens: int, hash_block_size: int, end: int) -> Helper:
        self._number += 1
        name = f"{request.request_id}-{what}-{self._number}"
        made = helper_of(request, name, tokens, hash_block_size, OPT_OUT)
        helper = self.of_name[name] = Helper(made, request.request_id, end)
        return helper
