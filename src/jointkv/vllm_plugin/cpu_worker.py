"""vLLM's CPU worker with remapping. Chosen by `--worker-cls`."""

from vllm.v1.worker.cpu_worker import CPUWorker

from jointkv.vllm_plugin.worker import RemappingWorker


class JointCPUWorker(RemappingWorker, CPUWorker):
    """vLLM's CPU worker, which takes committed remaps into its block tables before every step."""
