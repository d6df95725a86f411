"""Without a CUDA device Triton's kernels run in its interpreter, of which Triton must know when it is imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from jointkv.attention import cpu


@contextmanager
def told() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        yield


with told(), suppress(ImportError):
    import jointkv.attention.paged_triton  # noqa: F401


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Triton imports some of itself only when a kernel runs."""
    with told():
        yield


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """No kernel has been built or asked for yet."""
    monkeypatch.setenv("JOINTKV_CACHE_DIR", str(tmp_path))
    cpu.compiled.cache_clear()
    yield
    cpu.compiled.cache_clear()
