"""The layer of a transformers cache whose K and V lie in pages."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class PagedCacheLayer(CacheLayerMixin):
    """A full-attention layer of a cache that keeps its K and V in pages.

    Args:
        write: the cache's method that `update` is passed on to.

    Attributes:
        index: its number among the full-attention layers.
        length: tokens written, left padding included.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, write: Callable[[PagedCacheLayer, Tensor, Tensor], tuple[Tensor, Tensor]], index: int) -> None:
        super().__init__()
        # Weak, so that pages return to the pool as soon as the cache is dropped.
        self._write = weakref.WeakMethod(write)
        self.index = index
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states `[rows, h, n, d]`; returns what attention needs: pages, or dense K and V."""
        write = self._write()
        assert write is not None
        return write(self, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1
