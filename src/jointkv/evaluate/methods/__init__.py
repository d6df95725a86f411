"""Ways of holding KV in less memory, by name: fusion and what a user might take instead."""

from jointkv.evaluate.methods.base import Method
from jointkv.evaluate.methods.cache_blend import CacheBlend
from jointkv.evaluate.methods.epic import Epic
from jointkv.evaluate.methods.exact_prefix import ExactPrefix
from jointkv.evaluate.methods.full_reuse import FullReuse
from jointkv.evaluate.methods.fused import Fused, Paper
from jointkv.evaluate.methods.fused_quantized import FusedQuantized, QuantizedPages
from jointkv.evaluate.methods.kvzip import KVzip
from jointkv.evaluate.methods.minicache import MiniCache
from jointkv.evaluate.methods.pressed import PRESSES
from jointkv.evaluate.methods.quantized import Quantized
from jointkv.evaluate.methods.reuse import Reuse, ReuseMoved
from jointkv.evaluate.methods.semantic import Semantic
from jointkv.evaluate.methods.unfused import Unfused
from jointkv.evaluate.named import find

_METHODS: tuple[Method, ...] = (
    Unfused(),
    ExactPrefix(),
    Fused(),
    Paper(),
    Reuse(),
    ReuseMoved(),
    FullReuse(),
    Epic(),
    CacheBlend(),
    FusedQuantized(),
    QuantizedPages(),
    Quantized(),
    MiniCache(),
    Semantic(),
    *PRESSES,
    KVzip(),
)


def method_names() -> tuple[str, ...]:
    """The names that `get_method` knows, in the order of reports."""
    return tuple(method.name for method in _METHODS)


def get_method(name: str) -> Method:
    """The method called `name`. Raises `BadInput` for an unknown name."""
    return find("method", _METHODS, name)
