"""Synthetic but plausible results of every format. The numbers mean nothing."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METHODS = (
    # name, shares across requests, frees engine memory, (level, share held, KL)
    ("unfused", False, True, ((1.0, 1.0, 0.0),)),
    ("exact_prefix", True, True, ((1.0, 0.998, 0.0),)),
    ("fused", True, True, ((0.05, 0.41, 2e-5), (0.1, 0.29, 8e-5), (0.2, 0.255, 3e-4), (0.4, 0.2, 0.011))),
    ("paper", True, True, ((0.9, 0.3, 0.05), (0.8, 0.14, 0.37), (0.7, 0.06, 1.4))),
    ("fused_quantized", True, True, ((8.0, 0.15, 2e-4), (4.0, 0.08, 0.009), (2.0, 0.05, 0.9))),
    ("quantized_pages", False, True, ((8.0, 0.53, 1e-4), (4.0, 0.28, 0.008), (2.0, 0.16, 1.1))),
    ("quantized", False, False, ((8.0, 0.56, 9e-5), (4.0, 0.31, 0.007), (2.0, 0.19, 0.8))),
    ("minicache", False, False, ((0.25, 0.88, 0.4), (0.5, 0.76, 1.9), (0.75, 0.63, 3.2))),
    ("semantic", True, True, ((0.999, 1.0, 0.0), (0.99, 0.7, 0.3), (0.95, 0.3, 0.9), (0.9, 0.04, 1.6))),
    ("snapkv", False, False, ((0.75, 0.75, 0.006), (0.5, 0.5, 0.03), (0.25, 0.25, 0.11), (0.125, 0.125, 0.3))),
    ("expected_attention", False, False, ((0.75, 0.75, 0.02), (0.5, 0.5, 0.07), (0.25, 0.25, 0.4), (0.125, 0.125, 1))),
    ("knorm", False, False, ((0.75, 0.75, 0.05), (0.5, 0.5, 0.3), (0.25, 0.25, 1.1), (0.125, 0.125, 2.2))),
    ("tova", False, False, ((0.75, 0.75, 0.004), (0.5, 0.5, 0.02), (0.25, 0.25, 0.09), (0.125, 0.125, 0.24))),
    ("streaming_llm", False, False, ((0.75, 0.75, 0.1), (0.5, 0.5, 0.2), (0.25, 0.25, 0.33), (0.125, 0.125, 0.5))),
)
TRAFFICS = ("near_prefix", "names", "shuffled_examples", "tool_dialogues", "retrieval", "long_documents", "unrelated")


def evaluation(traffics: Sequence[str] = TRAFFICS, seed: int = 0) -> dict[str, Any]:
    """Every method on every traffic, KVzip not run, and four tasks."""
    draw = random.Random(seed)
    rows = [
        method_row(
            traffic, name, shares, frees, level, held + (1 - held) * 0.12 * place * shares, kl * draw.uniform(0.5, 2)
        )
        for place, traffic in enumerate(traffics)
        for name, shares, frees, levels in METHODS
        for level, held, kl in levels
    ]
    for traffic in traffics:
        row = method_row(traffic, "kvzip", False, False, 0.5, 1.0, 0.0)
        left = ("nbytes", "counted", "share", "share_16bit", "kl", "kl_worst_request", "top1", "nll", "nll_reference")
        unmeasured = {**dict.fromkeys((*left, "common_prefix")), "generated": 0}
        rows.append({**row, **unmeasured, "not_run": "TypeError: forward() got a | and\na second line"})
    return {
        "format": "jointkv.evaluate/1",
        "model": "smollm2",
        "dtype": "float32",
        "settings": {"requests": 24},
        "versions": {},
        "machine": {},
        "traffics": {name: {"requests": 24, "prompt_tokens": 18000, "description": ""} for name in traffics},
        "rows": rows,
        "tasks": [
            score
            for task, metric in (
                ("gsm8k", "exact_match"),
                ("mmlu", "accuracy"),
                ("qmsum", "rouge_l"),
                ("ruler", "recall"),
            )
            for score in _task(task, metric, draw)
        ],
    }


def method_row(
    traffic: str, name: str, shares: bool, frees: bool, level: float, held: float, kl: float
) -> dict[str, Any]:
    return {
        "traffic": traffic,
        "method": name,
        "level": level,
        "level_means": "share of tokens kept",
        "shares_across_requests": shares,
        "frees_engine_memory": frees,
        "environment": "torch 2.13.0",
        "not_run": None,
        "nbytes": int(held * 1e8),
        "unfused_nbytes": 100_000_000,
        "counted": "allocator" if frees else "tensors",
        "share": held,
        "share_16bit": held,
        "kl": kl,
        "kl_worst_request": kl * 4.7,
        "top1": 1 / (1 + kl),
        "nll": 1.6731 + kl / 2,
        "nll_reference": 1.6731,
        "per_request": [],
        "generated": 32,
        "common_prefix": 32 / (1 + 5 * kl),
        "outputs": [],
    }


def _task(task: str, metric: str, draw: random.Random) -> list[dict[str, Any]]:
    found = []
    for name, _, _, levels in METHODS[:9]:
        mean, width = draw.uniform(-0.15, 0.03) * (name != "unfused"), draw.uniform(0.01, 0.08)
        found.append(
            {
                "task": task,
                "metric": metric,
                "method": name,
                "level": levels[0][0],
                "scores": [0.0, 1.0],
                "mean": 0.4 + mean,
                "source": "the local GSM8K sample",
                "stand_in": task == "gsm8k",
                "nbytes": 10,
                "unfused_nbytes": 20,
                "counted": "tensors",
                "batch_size": 8,
                "seconds": 3.0,
                "difference": None
                if name == "unfused"
                else {"mean": mean, "low": mean - width, "high": mean + width * 0.8},
            }
        )
    return found


def curves(traffic: str = "near_prefix", best: float = 4.2, layers: int = 30) -> dict[str, Any]:
    """The curve of all layers and one for each of them."""
    return {
        "format": "jointkv.curves/1",
        "traffic": traffic,
        "requests": 32,
        "held_out": 32,
        "curves": [_curve(group, best, layers) for group in (None, *range(layers))],
    }


def _curve(group: int | None, best: float, layers: int) -> dict[str, Any]:
    lift = 0.0 if group is None else math.sin(3 * group / layers) * 0.6
    points = []
    for bound in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45):
        ratio = 1 + (best - 1 + lift) * (1 - math.exp(-bound / 0.07))
        rate = {"requests": 32, "ratio": ratio, "low": ratio * 0.93, "high": ratio * 1.08, "distinct": 100.0}
        measured = None if bound in (0.02, 0.45) else ratio * (1.04 + 0.02 * math.sin(40 * bound))
        points.append(
            {
                "bound": bound,
                "rate": {**rate, "method": "rarefaction"},
                "poisson": {**rate, "ratio": ratio**1.2, "method": "poisson"},
                "distortion": bound**2 * 0.2 * (1 - 1 / ratio),
                "measured_ratio": measured,
                "measured_distortion": None if measured is None else bound**2 * 0.21 * (1 - 1 / ratio),
            }
        )
    return {"group": group, "points": points}


def calibrations(seed: int = 0) -> dict[str, Any]:
    """Ten splits of every traffic and target; every tenth misses it."""
    draw = random.Random(seed)
    rows = []
    for traffic, ratio in zip(TRAFFICS, (3.9, 2.9, 2.1, 3.1, 1.7, 1.2, 1.0), strict=True):
        for target in ("kl=0.001", "kl=0.005", "ratio=2"):
            for split in range(10):
                measured = max(1.0, ratio * (1.08 if target == "kl=0.005" else 1) * draw.uniform(0.94, 1.06))
                predicted = max(1.0, measured * draw.uniform(0.92, 1.07))
                rows.append(
                    {
                        "traffic": traffic,
                        "target": target,
                        "seed": split,
                        "max_relative_error": [0.2],
                        "predicted": {
                            "ratio": predicted,
                            "low": predicted * 0.93,
                            "high": predicted * 1.08,
                            "requests": 32,
                        },
                        "held_out": {"ratio": measured, "kl": draw.uniform(1e-5, 1e-3), "kl_worst_request": 0.004},
                        "met": split != 3,
                        "seconds": draw.uniform(150, 250),
                    }
                )
    return {"format": "jointkv.calibration/1", "rows": rows}


def paper() -> dict[str, Any]:
    """Batch scope on five data sets, chunk scope on three, and layers at three thresholds."""
    policies = (("paper", 0.9, 0.12), ("paper", 0.8, 0.55), ("safe", 0.2, 0.03))
    return {
        "format": "jointkv.paper/1",
        "batch": [
            {
                "dataset": dataset,
                "policy": policy,
                "batch": 2**power,
                "threshold": threshold,
                "ratio": 1 + slope * power * (1 + place / 4),
                "ratio_fused_layers": 1 + 1.15 * slope * power * (1 + place / 4),
                "kl": slope * power / 10,
                "top1": 0.9,
                "f1": 0.42 - slope * power / 20 if dataset != "vllm_random" else None,
                "f1_unfused": 0.42 if dataset != "vllm_random" else None,
                "stand_in": dataset != "gsm8k",
                "source": "GSM8K test",
            }
            for place, dataset in enumerate(("gsm8k", "help_steer", "therapy", "open_math_instruct", "vllm_random"))
            for policy, threshold, slope in policies
            for power in range(1, 8)
        ],
        "chunk": [
            {
                "dataset": dataset,
                "policy": policy,
                "threshold": threshold,
                "ratio_fused_layers": 1 + 0.9 * loss + place / 20,
                "kl": loss * 0.1 * place,
                "top1": 0.93,
                "score": 0.2 - loss / 10,
                "score_unfused": 0.2,
                "metric": "rouge_l",
                "stand_in": False,
                "source": "LongBench",
            }
            for place, dataset in enumerate(("qmsum", "lcc", "repobench-p"))
            for policy, threshold, loss in (
                ("paper", 0.62, 0.9),
                ("paper", 0.7, 0.2),
                ("paper", 0.8, 0.04),
                ("safe", 0.2, 0.01),
            )
        ],
        "layers": [_layer(layer, threshold) for threshold in (0.7, 0.8, 0.9) for layer in range(2, 28)],
    }


def _layer(layer: int, threshold: float) -> dict[str, Any]:
    ratio = 1 + (1 - threshold) * 20 * (0.6 + 0.4 * math.sin(layer / 4))
    return {
        "layer": layer,
        "threshold": threshold,
        "measured": ratio,
        "poisson": ratio * 1.25,
        "poisson_low": ratio * 1.1,
        "poisson_high": ratio * 1.4,
        "tree": ratio * 1.1,
        "rarefaction": ratio * 1.02,
        "low": ratio * 0.93,
        "high": ratio * 1.1,
    }


def save(folder: Path, **results: dict[str, Any]) -> list[Path]:
    """Write each result to a file of its name in `folder`."""
    paths = []
    for name, result in results.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(result), encoding="utf-8")
    return paths
