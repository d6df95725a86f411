"""Ways of holding KV in less memory, by name: fusion and what a user might take instead."""

from jointkv.errors import BadInput
from jointkv.evaluate.methods.base import Batch, HeldBatch, Method
from jointkv.evaluate.methods.unfused import Unfused

__all__ = ["Batch", "HeldBatch", "Method", "get_method", "method_names"]

_METHODS: tuple[Method, ...] = (Unfused(),)


def method_names() -> tuple[str, ...]:
    """The names that `get_method` knows, in the order of reports."""
    return tuple(method.name for method in _METHODS)


def get_method(name: str) -> Method:
    """The method called `name`, with `-` or `_` between words. Raises `BadInput` for an unknown name."""
    for method in _METHODS:
        if method.name == name.replace("-", "_"):
            return method
    raise BadInput(f"unknown method {name!r}; known: {', '.join(method_names())}")
