"""Is a calibrated target met on unseen requests, and was the ratio predicted? Random splits of built-in traffic.

`python benchmarks/calibration.py --traffic names --target kl=0.0001 --output docs/results/calibration/names.json`
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from jointkv.evaluate.calibrate.result import CalibrationRow, Calibrations
from jointkv.system.files import replace_text


def run(arguments: argparse.Namespace) -> Calibrations:
    from jointkv.evaluate.calibrate.run import Calibration, TargetUnmet
    from jointkv.evaluate.calibrate.settings import CalibrationSettings
    from jointkv.evaluate.traffic import get_traffic
    from jointkv.hf.identity import model_identity
    from jointkv.hf.models import load_model
    from jointkv.policy.profile import Target

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
                    row: dict[str, Any] = {"traffic": name, "target": target, "seed": seed}
                    try:
                        calibration = Calibration(model, requests, settings, work=Path(work))
                        profile = calibration.run(identity, name, {})
                    except TargetUnmet as unmet:
                        row |= {"unmet": str(unmet), "met": False}
                    else:
                        row |= {
                            "max_relative_error": [group.max_relative_error for group in profile.groups],
                            "predicted": profile.predicted,
                            "predicted_equal_text": profile.predicted_equal_text,
                            "held_out": profile.held_out,
                            "met": profile.met,
                        }
                    rows.append(CalibrationRow(**row, seconds=time.monotonic() - start))
                    print(rows[-1].model_dump_json(exclude_none=True), flush=True)
    settings_of_run = {name: value for name, value in vars(arguments).items() if name not in ("output", "model")}
    return Calibrations(model=arguments.model, settings=settings_of_run, rows=rows)


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
    replace_text(arguments.output, result.model_dump_json(indent=1, exclude_none=True) + "\n")


if __name__ == "__main__":
    main()
