"""Triton's kernels run here as those of attention do."""

from __future__ import annotations

from contextlib import suppress

from tests.attention.conftest import interpreter, told  # noqa: F401

with told(), suppress(ImportError):
    import jointkv.fusion.kernels.gpu  # noqa: F401
