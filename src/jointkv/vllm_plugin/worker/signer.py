"""Takes signatures of pages, by which the scheduler finds blocks that are alike whatever their text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from jointkv.core.bookkeeping import bookkeeping
from jointkv.core.packed import PackedPages
from jointkv.core.transfer import to_host
from jointkv.fusion.signature import BlockSignature
from jointkv.vllm_plugin.messages import Inquiry


class PageSigner:
    """Signs pages on request.

    Every rank projects its own heads by random directions of its own, so the sum over ranks is a signature of the whole
    block: its squared distance estimates the mean over ranks too.

    Args:
        groups: pages of each KV-cache group that takes part, by group number.
        size: numbers of a signature.
        similarity: `"key"` where keys decide alone.
        rank, ranks: number of this worker, and how many there are.
    """

    def __init__(
        self,
        groups: dict[int, PackedPages],
        size: int,
        similarity: Literal["key", "key_value"] = "key_value",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.groups, self.size = groups, size
        self._part = ranks**-0.5
        self._signatures = {
            number: BlockSignature(pages, rank, size=size, similarity=similarity) for number, pages in groups.items()
        }

    @bookkeeping
    def begin(self, inquiry: Inquiry) -> Callable[[], np.ndarray]:
        """Have the pages of `inquiry` signed as they are once all that was asked of the device is done.

        Returns:
            What takes the signatures from the device: float16 `[m, size]`, in the order of the inquiry.
        """
        parts: list[tuple[np.ndarray, Callable[[], Tensor]]] = []
        for number in np.unique(inquiry.sign_group):
            chosen = inquiry.sign_group == number
            group = int(number)
            signed = self._signatures[group](self.groups[group], torch.from_numpy(inquiry.sign[chosen]))
            parts.append((chosen, to_host((signed * self._part).half())))
        size = self.size if len(inquiry.sign) else 0

        def take() -> np.ndarray:
            found = np.empty((len(inquiry.sign), size), np.float16)
            for chosen, arrived in parts:
                found[chosen] = arrived().numpy()
            return found

        return take
