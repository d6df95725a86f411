"""Committed results, as they are or cut short, and how results are written to files."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

RESULTS = Path(__file__).parents[2] / "docs" / "results"
Result = dict[str, Any]


@cache
def _text(name: str) -> str:
    return (RESULTS / f"{name}.json").read_text(encoding="utf-8")


def committed(name: str) -> Result:
    """The result `docs/results/NAME.json`, to be changed at will."""
    return json.loads(_text(name))


def evaluation(traffic: str = "near_prefix", rows: int | None = None) -> Result:
    """The first `rows` of the methods on one traffic, and the tasks."""
    result = committed(f"evaluate/{traffic}")
    return {**result, "rows": result["rows"][:rows], "tasks": committed("evaluate/tasks")["tasks"]}


def curves(layers: int = 30) -> Result:
    """The curve of all layers and those of the first `layers`."""
    result = committed("evaluate/curves_near_prefix")
    return {**result, "curves": result["curves"][: 1 + layers]}


def calibrations() -> Result:
    """Ten splits of one traffic."""
    return committed("calibration/names")


def paper(rows: int | None = None) -> Result:
    """The first `rows` of each experiment."""
    return {name: part[:rows] if isinstance(part, list) else part for name, part in committed("paper/paper").items()}


def side_channel(rows: int | None = None) -> Result:
    """What was told apart on a tiny model."""
    result = committed("side_channel/tiny")
    return {**result, "rows": result["rows"][:rows]}


def influence() -> Result:
    """Three kinds of attackers under five bounds."""
    return committed("side_channel/influence")


def codecs() -> Result:
    """Requests one after another, and what others publish."""
    return committed("codec/codec_streams")


def save(folder: Path, **results: Result | BaseModel) -> list[Path]:
    """Write each result to a file of its name in `folder`."""
    paths = []
    for name, result in results.items():
        paths.append(folder / f"{name}.json")
        text = result.model_dump_json() if isinstance(result, BaseModel) else json.dumps(result)
        paths[-1].write_text(text, encoding="utf-8")
    return paths
