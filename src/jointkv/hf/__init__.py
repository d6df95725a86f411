"""Joint encoding for transformers: `JointPool` holds pages and policy, `JointCache` is the cache of one batch."""

from jointkv.hf import compatibility

compatibility.check_transformers()  # what follows imports all of it, and would name the first difference only

from jointkv.hf.cache import JointCache  # noqa: E402
from jointkv.hf.pool import JointPool  # noqa: E402

compatibility.check_overrides()
compatibility.check_release()  # last: the others say what is different

__all__ = ["JointCache", "JointPool"]
