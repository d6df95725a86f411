"""The environment is the same for all arms, and leaves this process alone."""

from jointkv.bench.environment import GIB, engine_environment, server_environment


def test_an_engine_in_the_same_process() -> None:
    inherited = {"PATH": "/bin", "VLLM_CPU_OMP_THREADS_BIND": "auto"}
    made = engine_environment(inherited, {5, 0, 1, 2}, 3 * GIB + 1, local_model=True)
    assert made["PATH"] == "/bin" and made["VLLM_CPU_OMP_THREADS_BIND"] == "0-2,5" and made["OMP_NUM_THREADS"] == "4"
    assert made["VLLM_CPU_KVCACHE_SPACE"] == "4" and made["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert made["HF_HUB_OFFLINE"] == "1" and inherited["VLLM_CPU_OMP_THREADS_BIND"] == "auto"
    assert "HF_HUB_OFFLINE" not in engine_environment({}, {0}, 1, local_model=False)


def test_a_server() -> None:
    found = server_environment({"HOME": "/h", "VLLM_LOGGING_LEVEL": "ERROR"}, {0, 1}, 3 * GIB, local_model=True)
    assert found["HOME"] == "/h" and found["VLLM_CPU_OMP_THREADS_BIND"] == "0-1" and found["OMP_NUM_THREADS"] == "2"
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == found["VLLM_SERVER_DEV_MODE"] == "1"
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "3" and found["HF_HUB_OFFLINE"] == "1"
    assert found["VLLM_LOGGING_LEVEL"] == "INFO"
