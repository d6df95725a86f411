"""Ways of holding KV in less memory, by name: fusion and what a user might take instead."""

from jointkv.errors import BadInput
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.held import HeldBatch
from jointkv.evaluate.methods.base import Method
from jointkv.evaluate.methods.exact_prefix import ExactPrefix
from jointkv.evaluate.methods.expected_attention import ExpectedAttention
from jointkv.evaluate.methods.fused import Fused, Paper
from jointkv.evaluate.methods.fused_quantized import FusedQuantized, QuantizedPages
from jointkv.evaluate.methods.knorm import Knorm
from jointkv.evaluate.methods.kvzip import KVzip
from jointkv.evaluate.methods.minicache import MiniCache
from jointkv.evaluate.methods.quantized import Quantized
from jointkv.evaluate.methods.semantic import Semantic
from jointkv.evaluate.methods.snapkv import SnapKV
from jointkv.evaluate.methods.streaming_llm import StreamingLLM
from jointkv.evaluate.methods.tova import TOVA
from jointkv.evaluate.methods.unfused import Unfused

__all__ = ["Batch", "Fused", "HeldBatch", "Method", "get_method", "method_names"]

_METHODS: tuple[Method, ...] = (
    Unfused(),
    ExactPrefix(),
    Fused(),
    Paper(),
    FusedQuantized(),
    QuantizedPages(),
    Quantized(),
    MiniCache(),
    Semantic(),
    SnapKV(),
    ExpectedAttention(),
    Knorm(),
    TOVA(),
    StreamingLLM(),
    KVzip(),
)


def method_names() -> tuple[str, ...]:
    """The names that `get_method` knows, in the order of reports."""
    return tuple(method.name for method in _METHODS)


def get_method(name: str) -> Method:
    """The method called `name`, with `-` or `_` between words. Raises `BadInput` for an unknown name."""
    for method in _METHODS:
        if method.name == name.replace("-", "_"):
            return method
    raise BadInput(f"unknown method {name!r}; known: {', '.join(method_names())}")
