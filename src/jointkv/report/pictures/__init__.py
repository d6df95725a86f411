"""The pictures that `jointkv report plots` makes from JSON results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jointkv.errors import BadInput
from jointkv.report.pictures.base import Picture, png
from jointkv.report.pictures.influence import InfluenceOfAttackers
from jointkv.report.pictures.kl_against_bytes import KLAgainstBytes
from jointkv.report.pictures.layer_map import LayerMap
from jointkv.report.pictures.paper_batch import PaperBatch
from jointkv.report.pictures.paper_chunk import PaperChunk
from jointkv.report.pictures.paper_layers import PaperLayers
from jointkv.report.pictures.predicted_against_measured import PredictedAgainstMeasured
from jointkv.report.pictures.rate_distortion import RateDistortion
from jointkv.report.pictures.serving import ServingLevels
from jointkv.report.pictures.serving_ratios import ServingRatios
from jointkv.report.pictures.side_channel import SideChannelAUC
from jointkv.report.pictures.task_scores import TaskScores
from jointkv.report.results import read_results
from jointkv.system.files import replacing

PICTURES: tuple[Picture[Any], ...] = (
    KLAgainstBytes(),
    TaskScores(),
    RateDistortion(),
    LayerMap(),
    PredictedAgainstMeasured(),
    PaperBatch(),
    PaperChunk(),
    PaperLayers(),
    ServingLevels(),
    ServingRatios(),
    SideChannelAUC(),
    InfluenceOfAttackers(),
)


def make_pictures(paths: Sequence[Path], output: Path) -> list[Path]:
    """Write every picture that the results in `paths` have something for, and its table; returns the files written.

    All are made before the first is written.

    Raises:
        BadInput: what `read_results` raises, a result with nothing to show, or a folder that cannot be written.
    """
    results = read_results(paths)
    wanted = [
        (picture, [result for result in results if isinstance(result, picture.reads) and picture.shows(result)])
        for picture in PICTURES
    ]
    for path, result in zip(paths, results, strict=True):
        if not any(result is shown for _, chosen in wanted for shown in chosen):
            raise BadInput(f"{path}: nothing in it to show")
    files: dict[str, bytes] = {}
    for picture, chosen in wanted:
        if chosen:
            figure = picture.draw(chosen)
            if figure is not None:
                files[f"{picture.name}.png"] = png(figure)
            files[f"{picture.name}.md"] = picture.table(chosen).encode()
    with ExitStack() as written:  # they take their places when all are written
        for name, content in files.items():
            written.enter_context(replacing(output / name)).write_bytes(content)
    return [output / name for name in files]
