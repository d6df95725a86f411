"""Settings of vLLM for every test here. Without vLLM nothing in this folder is collected."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*test_*.py"]

ENVIRONMENT = {  # unless set outside
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_CI_ENV": "1",  # no warm-up
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",  # block hashes then agree between engines
    "TORCHDYNAMO_DISABLE": "1",  # for processes that tests start
}


@pytest.fixture(scope="session", autouse=True)
def _vllm_environment() -> Iterator[None]:
    if importlib.util.find_spec("vllm") is None:  # scripts in benchmarks/ have tests without it
        yield
        return
    import torch
    from vllm.model_executor.models import registry
    from vllm.platforms.cpu import CpuPlatform

    # vLLM binds no threads of an engine inside the test's own process; two that share a busy core wait for each other.
    torch.set_num_threads(1)
    # vLLM compiles some functions also where it runs eagerly; for a few tokens that takes longest.
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, os.environ.get(name, value))
        if "PYTEST_XDIST_WORKER" in os.environ:  # else all processes would be bound to one core
            core = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % (os.cpu_count() or 1)
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(core))
        # For every engine vLLM looks through all modules for kernels to replace, and falls over one of llvmlite's,
        # which speculative decoding brings.
        register = functools.cache(CpuPlatform.register_triton_kernel_overrides)
        patch.setattr(CpuPlatform, "register_triton_kernel_overrides", staticmethod(register))
        # To look at a kind of model for the first time, vLLM starts a process that imports everything anew.
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        yield


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in which a different first line changes K and V of what follows a little."""
    from tests.vllm_plugin.engines import write_model

    return write_model(tmp_path_factory.mktemp("calm"), context=0.15)


@pytest.fixture(scope="session")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in which everything depends strongly on what was read before."""
    from tests.vllm_plugin.engines import write_model

    return write_model(tmp_path_factory.mktemp("lively"), context=3.0)


@pytest.fixture(scope="module")
def patient_store() -> Iterator[None]:
    """A busy machine may look up and load as slowly as it likes."""
    from jointkv.vllm_plugin.scheduler import stored
    from jointkv.vllm_plugin.worker import loads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "LOOK_UP_S", 100.0)
        patch.setattr(loads, "HANGS_S", 100.0)
        yield


@pytest.fixture(scope="module")
def bold() -> Iterator[None]:
    """See `engines.BOLD`."""
    from jointkv.vllm_plugin.scheduler import side
    from tests.vllm_plugin.engines import BOLD

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side, "ReuseRule", BOLD)
        yield
