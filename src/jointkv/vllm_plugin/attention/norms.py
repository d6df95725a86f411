"""A worker's factors on the K and V that requests read from others' pages: a shared direction, own norms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jointkv.core.bookkeeping import bookkeeping
from jointkv.errors import IntegrityError
from jointkv.vllm_plugin.engine.runners.base import Remap
from jointkv.vllm_plugin.engine.steps import started
from jointkv.vllm_plugin.messages import Inquiry, patience

NO_PAGE = -1


class _Row:
    """Of one request and layer group: by slot the page a factor was made for, and the factors."""

    def __init__(self, layers: int) -> None:
        self.page = torch.full((0,), NO_PAGE)
        self.factors = torch.ones(2, layers, 0)

    def set(self, slot: int, page: int, factors: Tensor) -> None:
        """`factors [layers, 2]` for reading `page` at `slot`; `NO_PAGE` for none."""
        missing = max(slot + 1, 2 * len(self.page)) - len(self.page)
        if slot >= len(self.page):
            self.page = torch.nn.functional.pad(self.page, (0, missing), value=NO_PAGE)
            self.factors = torch.nn.functional.pad(self.factors, (0, missing), value=1.0)
        self.page[slot] = page
        self.factors[:, :, slot] = factors.T

    def cut(self, slots: int) -> None:
        """Forget all but the first `slots`."""
        self.page, self.factors = self.page[:slots].clone(), self.factors[:, :, :slots].clone()


class OwnNorms:
    """Follows what the scheduler commits. Factors go by request and slot, so they move with a request's table.

    Each worker has its own: with heads split over ranks, every rank keeps the norms of its heads.

    Args:
        layers: of every layer group.
        batches: steps in flight at a time.

    Attributes:
        enabled: whether blocks may be given factors from now on.
    """

    def __init__(self, layers: int, batches: int = 1) -> None:
        self.layers = layers
        self._kept = 2 * patience(batches)
        self.enabled = True
        self._proposed: dict[int, dict[tuple[int, int, int], Tensor]] = {}
        self._rows: dict[tuple[str, int], _Row] = {}

    def __len__(self) -> int:
        """Blocks that are read with factors."""
        return sum(int((row.page != NO_PAGE).sum()) for row in self._rows.values())

    @bookkeeping
    def propose(self, inquiry: Inquiry, factors: Tensor) -> None:
        """Keep `factors [pairs, layers, 2]` until the scheduler has followed the answer to `inquiry`, or never will."""
        pairs = zip(inquiry.group.tolist(), inquiry.own.tolist(), inquiry.other.tolist(), strict=True)
        self._proposed[inquiry.step] = dict(zip(pairs, factors, strict=True))
        for old in [known for known in self._proposed if known <= inquiry.step - self._kept]:
            del self._proposed[old]

    @bookkeeping
    def commit(self, remaps: Iterable[Remap]) -> None:
        """Take over the factors of blocks that are read from others' pages from now on.

        Raises:
            IntegrityError: there is no such answer. What the page alone holds would be a wrong number.
        """
        for remap in remaps:
            factors = self._proposed.get(remap.step, {}).get((remap.group, remap.own, remap.page))
            if factors is None:
                raise IntegrityError(f"the norms for {remap.request_id}, slot {remap.slot}, are lost")
            name = remap.request_id, remap.group
            whole = bool((factors == 1).all())
            if name in self._rows or not whole:
                row = self._rows.setdefault(name, _Row(self.layers))
                row.set(remap.slot, NO_PAGE if whole else remap.page, factors)

    @bookkeeping
    def follow(self, output: Any, block_sizes: dict[int, int], found: Mapping[str, int]) -> None:
        """Forget requests that end with the scheduler's `output`, and of those that come back what they did not find.

        Args:
            block_sizes: tokens per page of each KV-cache group that takes part.
            found: see `Inquiry.found`.
        """
        for request_id in output.finished_req_ids:
            for group in block_sizes:
                self._rows.pop((request_id, group), None)
        for request_id, computed in started(output):
            for group, size in block_sizes.items():
                if (request_id, group) in self._rows:
                    self._rows[request_id, group].cut(found.get(request_id, computed) // size)

    def table(self, group: int, requests: Sequence[str], pages: Tensor) -> Tensor | None:
        """The factors of a batch, `[2, layers, rows, slots]`; None where all are 1.

        Args:
            requests: of each row.
            pages: block tables `[rows, slots]`.

        Raises:
            IntegrityError: a request reads another page than the one its factor was made for.
        """
        held = [
            (number, self._rows[name, group]) for number, name in enumerate(requests) if (name, group) in self._rows
        ]
        if not held:
            return None
        table = torch.ones(2, self.layers, *pages.shape)
        for number, row in held:
            slots = min(len(row.page), pages.shape[1])
            given = row.page != NO_PAGE
            if given[slots:].any() or (pages[number, :slots] != row.page[:slots])[given[:slots]].any():
                raise IntegrityError("a request reads another page than the one its norms were made for")
            table[:, :, number, :slots] = row.factors[:, :, :slots]
        return table
