"""Small tensors are fastest on one thread, and a busy machine cannot stall a thread pool that is not there."""

import os
from pathlib import Path

import hypothesis
import pytest

from tests import hazards
from tests.hazards import pytest_addoption, pytest_runtest_setup  # noqa: F401

LONGEST = (
    *("vllm_plugin/test_server.py", "vllm_plugin/test_dashboard.py", "vllm_plugin/doctor/test_examine.py"),
    *("vllm_plugin/test_second_runner.py", "vllm_plugin/scheduler/test_state_machine.py"),
    *("benchmarks/test_gpu_proof.py", "vllm_plugin/test_isolation.py", "vllm_plugin/test_speculative.py"),
    *("vllm_plugin/test_real_model.py", "vllm_plugin/test_faults.py", "vllm_plugin/attention/test_norms.py"),
    *("evaluate/methods/test_quantized_cache.py", "evaluate/calibrate/test_calibration_real_model.py"),
    *("evaluate/traffic/test_traffic.py", "report/test_html.py"),
    *("hf/test_cache_generate.py", "hf/test_cache_models.py", "evaluate/compare/test_other_environment.py"),
    *("evaluate/compare/test_policies.py", "fusion/test_tree.py", "cli/test_cli_faults.py", "hf/test_compile.py"),
    *("fusion/kernels/test_gpu.py", "theory/test_confidence.py", "theory/test_licence.py"),
    *("evaluate/methods/test_all_methods.py", "evaluate/calibrate/test_calibration.py", "attention/test_cpu_kernel.py"),
)
"""Files that take 8 seconds and more, in the order in which they start: with few tests, `--dist loadfile` would leave
them for the end, where one process computes and the others wait."""


def pytest_configure(config: pytest.Config) -> None:
    """Files start in the order of `pytest_collection_modifyitems`, not by their number of tests."""
    hazards.pytest_configure(config)
    # Processes that tests start import what lies beside them.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(config.rootpath), os.environ.get("PYTHONPATH"))))
    # Threads that share a core spin while they wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config.option.loadscopereorder = False
    # How long an example takes says how busy the machine is.
    patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("patient", **patient)
    hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order is the same in every process."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    import torch  # pytest's own process, which hands tests out, does without

    real = request.node.get_closest_marker("real_model") is not None
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes) if real else 1)
