"""Is a calibrated target met on unseen requests, and was the ratio predicted? Random splits of built-in traffic.

`python benchmarks/calibration.py --traffic names --target kl=0.0001 --output docs/results/calibration/names.json`
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from jointkv.system.files import replace_text

FORMAT = "jointkv.calibration/1"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from jointkv.evaluate.calibrate import Calibration, CalibrationSettings, TargetUnmet
    from jointkv.evaluate.traffic import get_traffic
    from jointkv.hf.models import load_model
    from jointkv.hf.pool import model_identity
    from jointkv.policy.profile import Target
    from jointkv.system.machine import machine, versions

    model, tokenizer = load_model(arguments.model, dtype="float32")
    identity = model_identity(model)
    rows = []
    for name in arguments.traffic:
        requests = get_traffic(name).requests(tokenizer, arguments.requests, continuation_tokens=arguments.tokens)
        with tempfile.TemporaryDirectory(prefix="jointkv-splits-") as work:
            for target in arguments.target:
                for seed in range(arguments.splits):
                    settings = CalibrationSettings(Target.parse(target), seed=seed, block_size=arguments.block_size)
                    start = time.monotonic()
                    row = {"traffic": name, "target": target, "seed": seed}
                    try:
                        calibration = Calibration(model, requests, settings, work=Path(work))
                        profile = calibration.run(identity, name, {})
                    except TargetUnmet as unmet:
                        row |= {"unmet": str(unmet), "met": False}
                    else:
                        row |= {
                            "max_relative_error": [group.max_relative_error for group in profile.groups],
                            "predicted": profile.predicted.model_dump(),
                            "predicted_equal_text": profile.predicted_equal_text.model_dump(),
                            "held_out": profile.held_out.model_dump(),
                            "met": profile.met,
                        }
                    rows.append({**row, "seconds": time.monotonic() - start})
                    print(json.dumps(rows[-1]), flush=True)
    return {
        "format": FORMAT,
        "model": arguments.model,
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("output", "model")},
        "versions": versions(),
        "machine": machine(),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--traffic", action="append", required=True, help="may be repeated")
    parser.add_argument("--target", action="append", required=True, help="may be repeated")
    parser.add_argument("--requests", type=int, default=40, help="half of them choose, half check")
    parser.add_argument("--tokens", type=int, default=24, help="scored after each prompt")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    result = run(arguments)
    replace_text(arguments.output, json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
