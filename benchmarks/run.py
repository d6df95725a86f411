"""Runs every benchmark: `python benchmarks/run.py [--only NAME] [--output DIR] [--repeats N]`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

NAMES = ("planning", "online", "decode", "memory", "pair_sums", "signatures", "kernels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=NAMES, action="append", help="may be repeated; all by default")
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder for the JSON files")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for name in arguments.only or NAMES:
        importlib.import_module(name).run(arguments.output, arguments.repeats)


if __name__ == "__main__":
    main()
