"""vLLM's GPU worker with remapping. Chosen by `--worker-cls`. Written to the same interfaces; never run so far."""

from vllm.v1.worker.gpu_worker import Worker

from jointkv.vllm_plugin.worker import RemappingWorker


class JointGPUWorker(RemappingWorker, Worker):
    """vLLM's GPU worker, which takes committed remaps into its block tables before every step."""
