"""What one GPU proves of jointkv, without internet; meant for eight minutes, which no GPU has measured yet.

`python benchmarks/gpu_proof.py --output out/gpu_proof` on a machine with a GPU; `--interpret` on any other, where the
same runs small, with Triton's kernels in its interpreter. Stages run in order, each in a process of its own with a
limit; the first that fails is the last without `--keep-going`. After each the JSON is written, and the exit code
says whether all held. `gpu_bundle.py` packs what a machine without internet lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointkv.system.files import replace_text
from jointkv.system.machine import machine

ROOT = Path(__file__).parents[1]
FORMAT = "jointkv.gpu_proof/1"
KERNELS = ("tests/attention/test_triton_kernel.py", "tests/fusion/kernels/test_gpu.py")
GOALS = {
    "norm_aware_fraction_of_copy": "at least 0.85",
    "alone_over_shared_at_four": "at least 2",
    "prefill_over_torch": "at most 1.1",
}
"""Of the kernels, at batch 64 and context 4096."""


@dataclass(frozen=True)
class Stage:
    """A process that says what it found in the last line of its output, or fails.

    Attributes:
        name: what is proved.
        seconds: it may take on a GPU.
        argument: of `gpu_proof_stages.py`; None for the kernels' tests.
        runner: vLLM's model runner, "1" or "2".
        gpu: whether there is nothing of it to interpret.
        timed: whether it has to have the machine for itself.
    """

    name: str
    seconds: int
    argument: str | None
    runner: str = "2"
    gpu: bool = False
    timed: bool = False


STAGES = (
    Stage("imports and versions", 40, "versions"),
    Stage("kernels against float64", 90, None),
    Stage("the stock engine answers", 60, "stock"),
    Stage("off changes nothing", 60, "off"),
    Stage("page layouts", 90, "layouts", gpu=True),
    Stage("first runner at bound 0", 60, "equal", runner="1"),
    Stage("second runner at bound 0", 60, "equal"),
    Stage("second runner a step ahead at bound 0", 60, "ahead"),
    Stage("preempted and aborted", 60, "crowd"),
    Stage("resident text is not computed", 60, "reuse"),
    Stage("own norms and shared pages", 60, "norms"),
    Stage("graphs in pieces", 90, "pieces", gpu=True),
    Stage("full graphs", 90, "graphs", gpu=True),
    Stage("other attention backends", 120, "backends", gpu=True),
    Stage("a step's time", 120, "steps", timed=True),
    Stage("a pool that is too small", 120, "contended", timed=True),
    Stage("kernels against the copy bandwidth", 60, "bandwidth", gpu=True, timed=True),
)


def command(stage: Stage, folder: Path) -> list[str]:
    if stage.argument is None:
        return [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *KERNELS]
    return [sys.executable, str(Path(__file__).with_name("gpu_proof_stages.py")), stage.argument, str(folder)]


def environment(stage: Stage, interpret: bool) -> dict[str, str]:
    own = {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    device = {"JOINTKV_TEST_DEVICE": "interpreter"} if interpret else {"JOINTKV_TEST_DEVICE": "cuda"}
    return {**os.environ, **own, **device, "VLLM_USE_V2_MODEL_RUNNER": "1" if stage.runner == "2" else "0"}


def run(stage: Stage, folder: Path, interpret: bool, slower: int = 1) -> dict[str, Any]:
    """What became of a stage: "held", "failed" or "needs a GPU", and what it found."""
    if stage.gpu and interpret:
        return {"stage": stage.name, "outcome": "needs a GPU"}
    start, limit = time.monotonic(), stage.seconds * slower * (6 if interpret else 1)
    row: dict[str, Any] = {"stage": stage.name, "outcome": "failed"}
    try:
        done = subprocess.run(
            command(stage, folder),
            capture_output=True,
            text=True,
            timeout=limit,
            env=environment(stage, interpret),
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired as expired:
        tail = (expired.stderr or b"")[-2000:]
        row["why"] = f"not done after {limit} s: {tail.decode(errors='replace')}"
    else:
        if done.returncode == 0:
            row["outcome"] = "held"
            row["found"] = found_in(done.stdout)
        else:
            row["why"] = (done.stdout + done.stderr)[-4000:]
    return {**row, "seconds": round(time.monotonic() - start, 1)}


def found_in(output: str) -> Any:
    """The last line of JSON; else the last line."""
    lines = output.strip().splitlines() or [""]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return found[-1] if found else lines[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="without a GPU: small, and Triton is interpreted")
    parser.add_argument("--stage", action="append", help="these alone, by the beginning of their names")
    parser.add_argument("--keep-going", action="store_true", help="go on behind a stage that fails")
    parser.add_argument("--at-once", type=int, default=1, help="stages that are not timed, side by side; limits grow")
    parser.add_argument("--output", type=Path, default=Path("out/gpu_proof"), help="folder for gpu_proof.json")
    options = parser.parse_args()
    wanted = [one for one in STAGES if not options.stage or one.name.startswith(tuple(options.stage))]
    if not wanted:
        parser.error(f"no stage begins so; there are: {', '.join(one.name for one in STAGES)}")
    options.output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    writing = threading.Lock()

    def prove(stage: Stage, slower: int) -> bool:
        """False if nothing is to follow."""
        if not options.keep_going and any(row["outcome"] == "failed" for row in rows.values()):
            return False
        with tempfile.TemporaryDirectory() as folder:
            row = run(stage, Path(folder), options.interpret, slower)
        with writing:
            rows[stage.name] = row
            print(f"{stage.name}: {row['outcome']} {row.get('seconds', '')}", flush=True)
            if row["outcome"] == "failed":
                print(row["why"], file=sys.stderr)
            write(
                options.output, [rows[one.name] for one in wanted if one.name in rows], len(wanted), options.interpret
            )
        return row["outcome"] != "failed"

    first, *others = wanted
    if not prove(first, 1) and not options.keep_going:
        return 1
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(lambda stage: prove(stage, options.at_once), [stage for stage in others if not stage.timed]))
    for stage in others:
        if stage.timed:
            prove(stage, 1)
    return int(len(rows) < len(wanted) or any(row["outcome"] == "failed" for row in rows.values()))


def write(folder: Path, rows: list[dict[str, Any]], wanted: int, interpreted: bool) -> None:
    result = {
        "format": FORMAT,
        "interpreted": interpreted,
        "machine": machine(),
        "goals": GOALS,
        "complete": len(rows) == wanted and all(row["outcome"] != "failed" for row in rows),
        "stages": rows,
    }
    replace_text(folder / "gpu_proof.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
