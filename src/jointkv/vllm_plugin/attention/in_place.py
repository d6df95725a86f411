"""What a worker knows of text that requests read where it is resident, at another position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from jointkv.attention.rotary import Rotary
from jointkv.core.moved import Fills
from jointkv.errors import IntegrityError
from jointkv.vllm_plugin.engine.pages import NULL_PAGE
from jointkv.vllm_plugin.engine.steps import started
from jointkv.vllm_plugin.messages import ReadInPlace


class InPlace:
    """Follows what the scheduler says: which slots of a request, whose table holds no page there, read what.

    Args:
        rotary: how each layer turns its keys, and so queries.
    """

    def __init__(self, rotary: Sequence[Rotary], block_size: int) -> None:
        self.rotary, self._block_size = rotary, block_size
        self._of: dict[str, Fills] = {}

    def __len__(self) -> int:
        """Requests that read text at other positions."""
        return len(self._of)

    def follow(self, output: Any, reads: Iterable[ReadInPlace]) -> None:
        """Forget requests that end with the scheduler's `output`; those that start in it read what `reads` say."""
        for request_id in output.finished_req_ids:
            self._of.pop(request_id, None)
        for request_id, _ in started(output):
            self._of.pop(request_id, None)
        for request_id, fills in reads:
            self._of[request_id] = fills

    def rows(self, requests: Sequence[str], tables: Tensor, lengths: Tensor) -> dict[int, Fills]:
        """What slots of a batch read, by row.

        Args:
            requests: of each row.
            tables: pages `[rows, slots]`, of which those before `lengths [rows]` count.

        Raises:
            IntegrityError: these are not all the slots that hold no page.
        """
        pages, tokens = tables.numpy(force=True), lengths.numpy(force=True)
        none = (pages == NULL_PAGE) & (np.arange(pages.shape[1]) * self._block_size < tokens[:, None])
        moved = {row: self._of[name] for row, name in enumerate(requests) if name in self._of}
        for row, fills in moved.items():
            if fills.slots.max() >= pages.shape[1] or not none[row, fills.slots].all():
                raise IntegrityError("a request has a page where it is to read text at another position")
            none[row, fills.slots] = False
        if none.any():
            raise IntegrityError("a request has no page, and nobody says what it reads instead")
        return moved
