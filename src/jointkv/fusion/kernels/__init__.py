"""Kernels that read pages once, where plain torch would gather them in float32 first; a file per kind of device."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol

from torch import Tensor

from jointkv.core.blocks import KVPages
from jointkv.core.packed import PackedPages
from jointkv.errors import NativeUnavailable

MODULES = {"cpu": "cpu", "cuda": "gpu"}
"""The module of this package whose `Kernels` take pages on a device. A new one is a file, and a line here."""


SignatureKernel = Callable[[KVPages, Tensor], Tensor]
"""Signatures of blocks, given as page numbers, int64 on the CPU."""


class Kernels(Protocol):
    """What the module of a device has. Making one raises NativeUnavailable where it cannot be built."""

    def pair_sums(self, pages: PackedPages, own: Tensor, other: Tensor) -> Tensor:
        """What `jointkv.fusion.pair_sums.pair_sums` returns, on the pages' device, for which nothing waits.

        `own` and `other` are on the CPU, and known to be right.
        """

    def signatures(self, kv: KVPages, projections: Sequence[Tensor]) -> SignatureKernel:
        """The kernel for pages with the dtype and the order of elements of `kv`, contiguous in either.

        Args:
            projections: for K and for V, float32 `[r, columns]` on the pages' device.
        """


@functools.cache
def kernels_for(device: str) -> Kernels | None:
    """The kernels for pages on a type of device; None, where there are none. Says once what is missing on the CPU."""
    if device not in MODULES:
        return None
    try:
        kernels: Kernels = import_module(f"{__name__}.{MODULES[device]}").Kernels()
    except ModuleNotFoundError:  # such as Triton
        return None
    except NativeUnavailable as error:
        warnings.warn(
            "comparing KV pages runs some fifty times slower without a C compiler: "
            f"install gcc or clang, or name one in CC ({error})",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return kernels
