"""Makes vLLM in this process believe in Triton, whose kernels the interpreter runs. Import it before vLLM.

vLLM decides when it is imported whether there is Triton, so what needs it here runs in a process of its own.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.backends

# vLLM asks for a backend for the processor, which the interpreter does without; its kernels ask what GPU it is.
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))
torch.cuda.get_device_capability = lambda device=None: (9, 0)
