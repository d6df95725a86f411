"""The pictures that `jointkv report plots` makes from JSON results."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from jointkv.errors import BadInput
from jointkv.report.figure import png, style
from jointkv.report.pictures.advice import AdvicePicture
from jointkv.report.pictures.base import Picture
from jointkv.report.pictures.codec_rates import RatesOfCodecs
from jointkv.report.pictures.frontier import Frontier
from jointkv.report.pictures.influence import InfluenceOfAttackers
from jointkv.report.pictures.kl_against_bytes import KLAgainstBytes
from jointkv.report.pictures.kl_against_computed import KLAgainstComputed
from jointkv.report.pictures.layer_map import LayerMap
from jointkv.report.pictures.long_run import LongRuns
from jointkv.report.pictures.paper_batch import PaperBatch
from jointkv.report.pictures.paper_chunk import PaperChunk
from jointkv.report.pictures.paper_layers import PaperLayers
from jointkv.report.pictures.predicted_against_measured import PredictedAgainstMeasured
from jointkv.report.pictures.rate_distortion import RateDistortion
from jointkv.report.pictures.reuse_predictors import ReusePredictors
from jointkv.report.pictures.serving import ServingLevels
from jointkv.report.pictures.serving_arms import ServingArms
from jointkv.report.pictures.serving_quality import ServingQuality
from jointkv.report.pictures.serving_ratios import ServingRatios
from jointkv.report.pictures.serving_table import ServingTable
from jointkv.report.pictures.side_channel import SideChannelAUC
from jointkv.report.pictures.task_scores import TaskScores
from jointkv.report.results import conflict, read_result
from jointkv.system.files import replacing
from jointkv.system.nearest import not_known

PICTURES: tuple[Picture[Any], ...] = (
    KLAgainstBytes(),
    KLAgainstComputed(),
    TaskScores(),
    RateDistortion(),
    LayerMap(),
    PredictedAgainstMeasured(),
    PaperBatch(),
    PaperChunk(),
    PaperLayers(),
    ServingLevels(),
    ServingRatios(),
    ServingArms(),
    ServingTable(),
    ServingQuality(),
    SideChannelAUC(),
    InfluenceOfAttackers(),
    ReusePredictors(),
    AdvicePicture(),
    Frontier(),
    LongRuns(),
    RatesOfCodecs(),
)
FORMATS: tuple[type[BaseModel], ...] = tuple(dict.fromkeys(picture.reads for picture in PICTURES))


def make_pictures(paths: Sequence[Path], output: Path, only: Collection[str] = ()) -> list[Path]:
    """Write every picture that the results in `paths` have something for, and its table; returns the files written.

    All are made before the first is written.

    Args:
        only: names of pictures; all that there is something for if empty.

    Raises:
        BadInput: an unknown name, what `read_result` raises, results that must not be put together, one with nothing to
            show, or a folder that cannot be written.
    """
    names = [picture.name for picture in PICTURES]
    for name in only:
        if name not in names:
            raise BadInput(f"unknown picture {not_known(name, names)}")
    results = [(path, read_result(path, FORMATS)) for path in paths]
    files: dict[str, bytes] = {}
    shown = set()
    for picture in (each for each in PICTURES if not only or each.name in only):
        chosen = [(path, each) for path, each in results if isinstance(each, picture.reads) and picture.rows([each])]
        for (before, one), (path, other) in combinations(chosen, 2):
            reason = conflict(picture.conditions(one), picture.conditions(other))
            if reason is not None:
                raise BadInput(f"{before} and {path} cannot be put into one picture: {reason}")
        if chosen:
            shown |= {path for path, _ in chosen}
            files |= _made(picture, [result for _, result in chosen])
    for path in paths:
        if path not in shown:
            raise BadInput(f"{path}: nothing in it to show")
    with ExitStack() as written:  # they take their places when all are written
        for name, content in files.items():
            written.enter_context(replacing(output / name)).write_bytes(content)
    return [output / name for name in files]


def _made(picture: Picture[Any], results: Sequence[BaseModel]) -> dict[str, bytes]:
    """The files of a picture by name."""
    with style():
        figure = picture.draw(results)
        drawn = {} if figure is None else {f"{picture.name}.png": png(figure)}
    return drawn | {f"{picture.name}.md": picture.table(results).encode()}
