"""Small tensors are fastest on one thread, and a busy machine cannot stall a thread pool that is not there."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    real = request.node.get_closest_marker("real_model") is not None
    torch.set_num_threads(os.cpu_count() or 1 if real else 1)
