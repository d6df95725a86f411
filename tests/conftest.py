"""Small tensors are fastest on one thread, and a busy machine cannot stall a thread pool that is not there."""

import os

import pytest
import torch

from tests import hazards
from tests.hazards import pytest_addoption, pytest_runtest_setup  # noqa: F401

LONGEST = (
    *("test_dashboard.py", "test_serve_engine.py", "test_doctor_engine.py", "test_plugin_tensor_parallel.py"),
    *("test_soak.py", "test_real_engine.py", "test_plugin_real_model.py", "test_scheduler_machine.py"),
    *("test_calibration_real_model.py", "test_cache_generate.py", "test_cache_models.py", "test_html.py"),
    *("test_task_run.py", "test_tree.py", "test_worker.py", "test_cli_faults.py", "test_held.py"),
    *("test_serving_machine.py", "test_fused_methods.py"),
)
"""Files that take 15 seconds and more, in the order in which they start: with few tests, `--dist loadfile` would leave
them for the end, where one process computes and the others wait."""


def pytest_configure(config: pytest.Config) -> None:
    """Files start in the order of `pytest_collection_modifyitems`, not by their number of tests."""
    hazards.pytest_configure(config)
    # Processes that tests start import what lies beside them.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(config.rootpath), os.environ.get("PYTHONPATH"))))
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order is the same in every process."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    real = request.node.get_closest_marker("real_model") is not None
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes) if real else 1)
