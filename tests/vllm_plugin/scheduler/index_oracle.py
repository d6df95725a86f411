"""What must hold of the index of resident blocks, by their texts and by their signatures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from jointkv.fusion.signature import token_hashes
from jointkv.fusion.token_index import places


class Index:
    """Follows what the index says of each page.

    Args:
        oracle: of the engine, attached.
    """

    def __init__(self, oracle: Any) -> None:
        self._residents = oracle.side.candidates.residents
        self._pages, self._size, self._chunk_tokens = oracle.pages, oracle.size, oracle.settings.chunk_tokens
        self._indexed: dict[int, tuple[Any, int]] = {}

    def check(self) -> None:
        """No page in the index was handed out again, and every one holds what its bucket says."""
        index = self._residents.index._buckets
        for page, places_of_page in self._residents.signatures._of_page.items():
            start = self._pages.text[page][0][0] // self._size
            for owner, _, position in places_of_page:
                by_position = len(owner) == 3  # an isolation key
                slot = start if by_position else start % (self._chunk_tokens // self._size)
                assert position == slot, "a signature is at another position"
                assert not by_position or owner[0] == self._pages.salts[page], "a signature is at another salt"
        for page, buckets in index.items():
            seen = self._indexed.get(page)
            if seen is not None and seen[0] is buckets:
                assert self._pages.generation[page] == seen[1], "the index holds a page that was handed out again"
                continue
            self._indexed[page] = buckets, self._pages.generation[page]
            start = self._pages.text[page][0][0] // self._size
            text = token_hashes(torch.tensor([token for _, token in self._pages.text[page]]), self._size).numpy()
            for (owner, _), place in buckets:
                by_position = len(owner) == 3  # an isolation key
                slot = start if by_position else start % (self._chunk_tokens // self._size)
                assert [place] == places(text, np.array([slot])), "the index knows a page by another text or position"
                if by_position:
                    assert owner[0] == self._pages.salts[page], "the index knows a page by another salt"
        self._indexed = {page: self._indexed[page] for page in index}
