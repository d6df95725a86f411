"""Joint encoding for transformers: `JointPool` holds pages and policy, `JointCache` is the cache of one batch."""

from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool

__all__ = ["JointCache", "JointPool"]
