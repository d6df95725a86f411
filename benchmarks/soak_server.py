"""The server of the soak: that of `jointkv serve`, with witnesses inside that believe nothing they are told.

    python soak_server.py LAUNCH [vllm serve arguments]

One sits beside the scheduler and knows from vLLM's own tables who has written every page and who reads it; one sits
with the worker and computes the error of every accepted pair from the pages themselves. What they have seen goes to
files in the folder that JOINTKV_SOAK_WITNESS names.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

WITNESS = "JOINTKV_SOAK_WITNESS"
SAVE_SECONDS = 0.5
ROUNDING = 1e-4
"""The plugin adds up errors in another order than the witness."""


class Party(NamedTuple):
    """Who a request belongs to, and whether it takes part."""

    salt: str | None
    takes_part: bool


class Ledger:
    """Numbers in a file that is replaced every now and then."""

    def __init__(self, file: Path, **numbers: float) -> None:
        self.file, self.numbers = file, numbers
        self._saved = 0.0

    def add(self, **amounts: float) -> None:
        """Count more."""
        for name, amount in amounts.items():
            self.numbers[name] += amount

    def save(self, force: bool = False) -> None:
        """Write the file, unless it was just written."""
        if force or time.monotonic() - self._saved > SAVE_SECONDS:
            self._saved = time.monotonic()
            temporary = self.file.with_suffix(".part")
            temporary.write_text(json.dumps(self.numbers))
            temporary.replace(self.file)


class SchedulerWitness:
    """Attach to a `SchedulerSide` before its first request: it watches new requests, steps and replaced entries."""

    def __init__(self, side: Any, file: Path) -> None:
        self.side = side
        self.ledger = Ledger(
            file, steps=0, merges=0, merges_of_answers=0, adopted=0, cross_salt=0, opted_out=0, readers_of_two_salts=0
        )
        self._requests: dict[str, Any] = {}
        self._written_by: dict[int, Party] = {}
        self._replace = side.tables.replace
        side.tables.replace = self._replaced
        side.sharing.adopt = _both(self._adopted, side.sharing.adopt)
        for name, seen in (("admit", self._admitted), ("next_inquiry", self._stepped), ("dismiss", self._dismissed)):
            setattr(side, name, _both(seen, getattr(side, name)))

    def _admitted(self, request: Any) -> None:
        self._requests[request.request_id] = request

    def _dismissed(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self.ledger.save(force=not self._requests)

    def _stepped(self, output: Any) -> None:
        self.ledger.add(steps=1)
        salts: dict[int, str | None] = {}
        for group in self.side.tables.groups:
            for request_id in group.req_to_blocks.keys() & self._requests.keys():
                party, blocks = self._party(request_id), group.req_to_blocks[request_id]
                for block in blocks:
                    self._written_by[block.block_id] = party
                    if salts.setdefault(block.block_id, party.salt) != party.salt:
                        self.ledger.add(readers_of_two_salts=1)
        self.ledger.save()

    def _replaced(self, request_id: str, group: int, slot: int, page: int) -> None:
        self._shared(request_id, page)
        request, size = self._requests[request_id], self.side.tables.groups[group].block_size
        self.ledger.add(merges=1, merges_of_answers=(slot + 1) * size > request.num_prompt_tokens)
        self._replace(request_id, group, slot, page)

    def _adopted(self, tracked: Any, group: int, first: int, pages: list[int]) -> None:
        for page in pages:
            self._shared(tracked.request.request_id, page)
        self.ledger.add(adopted=len(pages))

    def _shared(self, request_id: str, page: int) -> None:
        party = self._party(request_id)
        for other in self._readers(page) or [self._written_by[page]]:
            self.ledger.add(cross_salt=other.salt != party.salt, opted_out=not (other.takes_part and party.takes_part))

    def _party(self, request_id: str) -> Party:
        request = self._requests[request_id]
        opted_out = (request.sampling_params.extra_args or {}).get("jointkv", 1) == 0
        return Party(request.cache_salt, not opted_out or request_id in self.side.helpers)

    def _readers(self, page: int) -> list[Party]:
        return [
            self._party(request_id)
            for group in self.side.tables.groups
            for request_id, blocks in group.req_to_blocks.items()
            if request_id in self._requests and any(block.block_id == page for block in blocks)
        ]


class WorkerWitness:
    """Attach to a `WorkerSide`: it looks at both pages of every remap before the first of them can be written again."""

    def __init__(self, side: Any, bound: Any, file: Path) -> None:
        self.ledger = Ledger(file, accepted=0, beyond_bound=0, largest_error=0.0)
        self.runner = side.tables.runner
        self._bounds = bound if isinstance(bound, tuple) else (bound,) * len(side.comparer.groups)
        side.apply = _both(self._applied, side.apply)

    def _applied(self, inquiry: Any) -> None:
        for remap in inquiry.remaps:
            error = self._error(remap.group, remap.own, remap.page)
            numbers = self.ledger.numbers
            numbers["largest_error"] = max(numbers["largest_error"], error)
            self.ledger.add(accepted=1, beyond_bound=not error <= self._bounds[remap.group] * (1 + ROUNDING))
        self.ledger.save(force=bool(inquiry.remaps))

    def _error(self, group: int, own: int, other: int) -> float:
        """Relative error of page `own` when it is read from `other`: root mean square over layers, of K or V."""
        import torch

        layers = self.runner.vllm_config.compilation_config.static_forward_context
        shares = []
        for name in self.runner.kv_cache_config.kv_cache_groups[group].layer_names:
            # A page of vLLM's CPU backend is, for every head, the rows of K and then those of V.
            pages = [layers[name].kv_cache[page].double() for page in (own, other)]
            true, read = (page.reshape(page.shape[0], 2, -1).transpose(0, 1).flatten(1) for page in pages)
            shares.append((true - read).square().sum(1) / true.square().sum(1))
        return float(torch.stack(shares).mean(0).max().sqrt())


def _both(first: Any, method: Any) -> Any:
    def watched(*arguments: Any) -> Any:
        first(*arguments)
        return method(*arguments)

    return watched


def watch(folder: Path) -> None:
    """Attach a witness to the scheduler, or the worker, that will be made in this process."""
    from jointkv.vllm_plugin.connector import JointConnector
    from jointkv.vllm_plugin.scheduler.side import SchedulerSide

    make, attach = SchedulerSide.__init__, JointConnector.attach

    def made(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        SchedulerWitness(self, folder / "scheduler.json")

    def attached(self: Any, runner: Any) -> None:
        attach(self, runner)
        WorkerWitness(self.worker, self.settings.max_relative_error, folder / "worker.json")

    SchedulerSide.__init__ = made  # type: ignore[method-assign]
    JointConnector.attach = attached  # type: ignore[method-assign]


if __name__ == "__mp_main__":  # the engine's and the worker's process, which vLLM spawns
    watch(Path(os.environ[WITNESS]))

if __name__ == "__main__":
    from jointkv.vllm_plugin.server import main

    main()
