"""What a request of a checked scheduler has computed, and what it would have computed alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.request import Request

from tests.vllm_plugin.scheduler.fake_pages import Block, within_bounds


@dataclass
class Account:
    """What one request has computed, and what it would have computed without fusion.

    Attributes:
        request: vLLM's own.
        twin: keeps the hashes of its text, whatever the request looks up itself.
        exact: per layer group the numbers of its text, token by token.
        own: per layer group and slot what it computed itself or found.
        ever: all that full blocks of `own` have been: a preempted request may find any of it again.
        merged: the page that (group, slot) reads from another, or that others read with it.
        generations: of those pages, as they were begun then.
        factors: with what factor it is to be read, where that is not 1.
        ever_merged: (group, slot) that did so at any time.
        delivered: tokens sent to the client.
        ended: why, as vLLM says; None while it lives.
    """

    request: Request
    twin: Request
    exact: list[list[int]]
    own: list[list[list[int]]]
    ever: list[defaultdict[int, set[Block]]]
    merged: dict[tuple[int, int], int] = field(default_factory=dict)
    generations: dict[tuple[int, int], int] = field(default_factory=dict)
    factors: dict[tuple[int, int], float] = field(default_factory=dict)
    ever_merged: set[tuple[int, int]] = field(default_factory=set)
    delivered: list[int] = field(default_factory=list)
    ended: str | None = None

    def may_read(self, group: int, slot: int, block: Block, policy: Any) -> bool:
        """Whether `block` is what the request itself once had at `slot`, or, after a merge, near it."""
        ever = self.ever[group][slot]
        if block in ever:
            return True
        return (group, slot) in self.ever_merged and any(within_bounds(own, block, policy) for own in ever)
