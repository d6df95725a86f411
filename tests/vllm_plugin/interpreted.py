"""Makes vLLM in this process believe in Triton, whose kernels the interpreter runs. Import it before vLLM.

vLLM decides when it is imported whether there is Triton, so what needs it here runs in a process of its own.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.backends
from triton import language
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# vLLM asks for a backend for the processor, which the interpreter does without; its kernels ask what GPU it is.
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))
torch.cuda.get_device_capability = lambda device=None: (9, 0)


def _truths(mask: Any) -> Any:
    """The compiler takes integers for masks."""
    return None if mask is None else TensorHandle(mask.data.astype(bool), language.int1)


load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
InterpreterBuilder.create_masked_load = lambda self, where, mask, *more: load(self, where, _truths(mask), *more)
InterpreterBuilder.create_masked_store = lambda self, where, what, mask, *more: store(
    self, where, what, _truths(mask), *more
)
