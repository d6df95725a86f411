"""The layer of a transformers cache whose K and V lie in pages."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn, Protocol

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from jointkv.errors import UnsupportedUse


class Pages(Protocol):
    """What a layer asks its cache."""

    def write_layer(
        self, layer: PagedCacheLayer, key_states: Tensor, value_states: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def read_layer(self, layer: PagedCacheLayer) -> tuple[Tensor, Tensor] | tuple[None, None]: ...

    def length_of(self, layer: PagedCacheLayer) -> int: ...


class PagedCacheLayer(CacheLayerMixin):
    """A full-attention layer of a cache that keeps its K and V in pages.

    Args:
        cache: that has the pages.

    Attributes:
        index: its number among the full-attention layers.
        expecting: whether the new tokens of a forward pass have places, and are not written yet.
        pending: new states of a forward pass whose tokens have no places yet.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: Pages, index: int) -> None:
        # Weak, so that pages return to the pool as soon as the cache is dropped.
        self._cache = weakref.ref(cache)
        self.index = index
        self.expecting = False
        self.pending: tuple[Tensor, Tensor] | None = None

    @property
    def cache(self) -> Pages:
        cache = self._cache()
        if cache is None:
            raise UnsupportedUse("the JointCache of this layer is gone, and its pages with it: keep the cache")
        return cache

    @property
    def length(self) -> int:
        """Tokens written, left padding included."""
        return self.cache.length_of(self)

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.length > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: there are pages as soon as there are tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states `[rows, h, n, d]`; returns what attention needs: pages, or dense K and V."""
        return self.cache.write_layer(self, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    # What others read and change in place.

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """A copy of K, `[rows, h, length, d]`, zeros where there is padding; None before the first forward pass."""
        return self.cache.read_layer(self)[0]

    @keys.setter
    def keys(self, keys: Tensor) -> NoReturn:
        _refuse_writes()

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """A copy of V, see `keys`."""
        return self.cache.read_layer(self)[1]

    @values.setter
    def values(self, values: Tensor) -> NoReturn:
        _refuse_writes()

    def offload(self) -> NoReturn:
        raise UnsupportedUse(
            "pages are read by several caches and stay on their device: save the cache to a file with JointCache.save, "
            "or use a DynamicCache(offloading=True)"
        )

    prefetch = offload

    def reset(self, *_arguments: Any) -> NoReturn:
        raise UnsupportedUse("the layers of a JointCache share their pages: call the same method of the cache")

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = reset


def _refuse_writes() -> NoReturn:
    raise UnsupportedUse(
        "K and V of a JointCache lie in pages that several caches read, and cannot be assigned: use a DynamicCache"
    )
