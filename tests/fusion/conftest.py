"""Triton's kernels run here as those of attention do."""

from __future__ import annotations

from contextlib import suppress

from tests.attention.conftest import interpreter, told  # noqa: F401

with told(), suppress(ImportError):
    import jointkv.fusion.signature_triton  # noqa: F401
