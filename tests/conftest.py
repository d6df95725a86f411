"""Small tensors are fastest on one thread, and a busy machine cannot stall a thread pool that is not there."""

import os

import pytest
import torch

from hazards import pytest_addoption, pytest_configure, pytest_runtest_setup  # noqa: F401


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    real = request.node.get_closest_marker("real_model") is not None
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes) if real else 1)
