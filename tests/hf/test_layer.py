"""The layer passes states on to the cache that it belongs to, which it does not keep alive."""

import pytest
import torch

from jointkv.errors import UnsupportedUse
from jointkv.hf.cache import JointCache
from tests.hf.tiny_models import joint


def test_it_tells_what_transformers_asks():
    _, pool = joint("llama")
    cache = JointCache(pool)
    layer = cache.layers[0]
    assert not layer.is_initialized and layer.get_seq_length() == 0 and layer.get_max_length() == -1
    layer.update(*torch.randn(2, 1, 2, 5, 8))
    assert layer.is_initialized and layer.get_seq_length() == 5 and layer.get_mask_sizes(3) == (8, 0)
    assert [other.get_seq_length() for other in cache.layers[1:]] == [0, 0]


def test_pages_go_back_as_soon_as_the_cache_is_dropped():
    _, pool = joint("llama")
    cache = JointCache(pool)
    layer = cache.layers[0]
    layer.update(*torch.randn(2, 1, 2, 5, 8))
    del cache
    assert pool.stats()["pages_used"] == 0
    with pytest.raises(UnsupportedUse, match="keep the cache"):
        layer.update(*torch.randn(2, 1, 2, 1, 8))
