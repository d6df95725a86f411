"""Decoding 16 sequences at 1000 tokens of context: `JointCache` against `DynamicCache`, in turns."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from jointkv.hf.cache import JointCache
from jointkv.hf.models import load_model
from jointkv.hf.pool import JointPool
from jointkv.system.machine import fast_dtype
from timing import median_ratio, paired, write

SEQUENCES, CONTEXT, STEPS = 16, 1000, 8


@torch.inference_mode()
def prefilled(model: PreTrainedModel, tokens: torch.Tensor, cache: Any) -> Any:
    model(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
    return cache


def run(output: Path, repeats: int = 5) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 49152, (SEQUENCES, CONTEXT))
    stock_model, _ = load_model("smollm2", dtype=fast_dtype())
    stock = prefilled(stock_model, tokens, DynamicCache(config=stock_model.config))
    arms: dict[str, tuple[PreTrainedModel, Any]] = {"dynamic": (stock_model, stock)}
    pools = []
    for policy in ("off", "safe"):
        model, _ = load_model("smollm2", dtype=fast_dtype())
        pools.append(JointPool(model, policy))
        arms[policy] = (model, prefilled(model, tokens, JointCache(pools[-1])))

    def decode(model: PreTrainedModel, cache: Any) -> None:
        with torch.inference_mode():
            for _ in range(STEPS):
                model(input_ids=tokens[:, :1], past_key_values=cache)
        cache.crop(-STEPS)

    works = [lambda model=model, cache=cache: decode(model, cache) for model, cache in arms.values()]
    samples = dict(zip(arms, paired(works, repeats), strict=True))
    rows = [
        {
            "cache": name,
            "seconds": seconds,
            "tokens_per_s": SEQUENCES * STEPS / median(seconds),
            "speed_over_dynamic": median_ratio(samples["dynamic"], seconds),
        }
        for name, seconds in samples.items()
    ]
    headline = {row["cache"]: round(row["speed_over_dynamic"], 3) for row in rows}
    result = {"sequences": SEQUENCES, "context": CONTEXT, "steps": STEPS, "rows": rows}
    write(output, "decode", {"headline": headline, **result})


if __name__ == "__main__":
    run(Path("out/bench"))
