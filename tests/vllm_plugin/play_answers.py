"""Random traffic in a process of its own, where an engine is not to run in that of the test.

Run as `python play_answers.py MODEL FILE OPTIONS`. Writes the answers to FILE, and prints a line of JSON: statistics of
the plugin, and `runners`, what follows the tables of each rank. OPTIONS are JSON: `fusion`, `pages`, `events`, `seed`,
`longest`, and of the engine. vLLM's second model runner, where the environment asks for it, has its Triton kernels
interpreted.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from tests.vllm_plugin.conftest import ENVIRONMENT

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    import tests.vllm_plugin.interpreted  # noqa: F401
for setting, value in ENVIRONMENT.items():
    os.environ.setdefault(setting, value)


def runner_of(worker: Any) -> str:
    """Which of vLLM's model runners `worker` has."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return type(get_kv_transfer_group().worker.tables).__name__


def main(model: Path, file: Path, options: dict[str, Any]) -> None:
    import torch  # every worker of several imports this file

    from jointkv.vllm_plugin.scheduler import side
    from tests.vllm_plugin.answers import play
    from tests.vllm_plugin.engines import BOLD, engine

    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    torch.set_num_threads(1)
    side.ReuseRule = BOLD
    traffic = {name: options.pop(name) for name in ("events", "seed", "longest")}
    with engine(model, options.pop("pages"), options.pop("fusion"), **options) as served:
        answers = play(served, **traffic)
        file.write_bytes(pickle.dumps(answers))
        print(json.dumps({**served.statistics, "runners": served.llm.collective_rpc(runner_of)}, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
