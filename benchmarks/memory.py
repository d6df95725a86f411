"""Peak resident memory of a process that holds 64 near-prefix requests of about 800 tokens, fused and unfused."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import psutil

from timing import write

REQUESTS, AT_A_TIME = 64, 4

MOST_REPEATS = 2
"""A run takes minutes, and memory differs little from one to the next."""


def hold(policy: str) -> dict[str, int]:
    """Prefill the requests a few at a time, keep every cache, and read the process's own accounting."""
    import torch

    from jointkv.evaluate.holding.prefilled import left_padded
    from jointkv.evaluate.traffic import get_traffic
    from jointkv.hf.cache import JointCache
    from jointkv.hf.models import load_model
    from jointkv.hf.pool import JointPool
    from jointkv.system.machine import fast_dtype

    model, tokenizer = load_model("smollm2", dtype=fast_dtype())
    requests = get_traffic("near_prefix").requests(tokenizer, REQUESTS, continuation_tokens=1)
    pool = JointPool(model, policy)
    caches = []
    before = resident_bytes()
    for start in range(0, REQUESTS, AT_A_TIME):
        prompt, mask = left_padded([request.prompt for request in requests[start : start + AT_A_TIME]], pad=0)
        cache = JointCache(pool)
        with torch.inference_mode():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model(
                input_ids=prompt,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            )
        caches.append(cache)
    stats = pool.stats()
    return {
        "resident_before": before,
        "resident_after": resident_bytes(),
        "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens": sum(cache.stats()["tokens"] for cache in caches),
        "kv_bytes_unfused": stats["references"] * stats["page_bytes"],
        "kv_bytes_used": stats["bytes_used"],
    }


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def run(output: Path, repeats: int = 5) -> None:
    runs: dict[str, list[dict[str, int]]] = {"off": [], "safe": []}
    for _ in range(min(repeats, MOST_REPEATS)):
        for policy, results in runs.items():
            command = [sys.executable, __file__, policy]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    unfused = runs["off"][0]["kv_bytes_unfused"]
    saved = [off["peak_resident"] - safe["peak_resident"] for off, safe in zip(*runs.values(), strict=True)]
    headline = {"peak_saved_over_unfused_kv": round(median(saved) / unfused, 3)}
    result = {"requests": REQUESTS, "kv_bytes_unfused": unfused, "peak_saved": saved, "runs": runs}
    write(output, "memory", {"headline": headline, **result})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(hold(sys.argv[1])))
    else:
        run(Path("out/bench"))
