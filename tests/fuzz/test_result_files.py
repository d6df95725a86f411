"""Results that reports are made from, folders of benchmarks, and what processes of jointkv hand to each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jointkv.bench.result import Load, ServingResult
from jointkv.bench.run_folder import RunFolder
from jointkv.errors import BadInput
from jointkv.evaluate.calibrate.store import MEASURED
from jointkv.evaluate.compare.comparison import not_run
from jointkv.evaluate.compare.other_environment import read_job, read_rows, run_job
from jointkv.evaluate.methods import get_method
from jointkv.report.pictures import FORMATS, PICTURES
from jointkv.report.results import read_result
from jointkv.report.serving.result import Serving, comparable
from jointkv.vllm_plugin.server import Launch
from tests.effort import fuzz_settings
from tests.fuzz.damage import PROMISE, json_bytes, promise, slower, unreadable
from tests.report import samples, serving_samples

JOB = {
    "format": "jointkv.methods.job/1",
    "model": "/nowhere",
    "dtype": "float32",
    "block_size": 16,
    "traffic": "t",
    "generate": 0,
    "requests": [[[1, 2], [3]]],
    "methods": [["no such method", 0.5]],
}
LAUNCH = {"options": {"max_relative_error": 0.1, "scope": "chunk", "chunk_tokens": 64}, "device": "cpu"}


@cache
def serving() -> Any:
    found = serving_samples.result(loads=(*serving_samples.CLOSED[:1], *serving_samples.BURSTY), rounds=1)
    return json.loads(found.model_dump_json())


RESULTS: dict[str, Callable[[], Any]] = {
    "evaluation": cache(lambda: samples.evaluation(rows=3)),
    "curves": cache(lambda: samples.curves(layers=2)),
    "calibrations": cache(samples.calibrations),
    "paper": cache(lambda: samples.paper(rows=3)),
    "serving": serving,
    "side_channel": cache(lambda: samples.side_channel(rows=3)),
    "influence": cache(samples.influence),
}


@pytest.mark.hazard("Parsers", "a damaged or hostile result", PROMISE)
@slower(4)
@given(kind=st.sampled_from(sorted(RESULTS)), data=st.data())
def test_results(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(data.draw(json_bytes(RESULTS[kind]())))
    with promise():
        result = read_result(path, FORMATS)
        for picture in PICTURES:
            if isinstance(result, picture.reads):
                picture.conditions(result)
    if kind == "serving":
        with promise():
            assert comparable([read_result(path, [Serving])])


@pytest.mark.hazard("Parsers", "a damaged or hostile result", PROMISE)
def test_results_that_are_no_files(tmp_path: Path) -> None:
    for path in unreadable(tmp_path):
        with pytest.raises(BadInput):
            read_result(path, FORMATS)
        with pytest.raises(BadInput):
            ServingResult.load(path)


@pytest.mark.hazard("Parsers", "a damaged folder of a benchmark", PROMISE)
@slower(4)
@given(data=st.data())
def test_folders_of_benchmarks(tmp_path: Path, data: st.DataObject) -> None:
    settings = {"model": "smollm2", "arms": [{"name": "stock"}]}
    run = serving()["runs"][0]
    files = {"settings.json": settings, "runs/a.json": run, "runs/a.outputs.json": ["one", "two"]}
    chosen = data.draw(st.sampled_from(sorted(files)))
    (tmp_path / "runs").mkdir(exist_ok=True)
    for name, content in files.items():
        text = data.draw(json_bytes(content)) if name == chosen else json.dumps(content).encode()
        (tmp_path / name).write_bytes(text)
    with promise():
        folder = RunFolder(tmp_path, settings)
        assert all(isinstance(text, str) for texts in folder.outputs.values() for text in texts)


@pytest.mark.hazard("Parsers", "what a process of a comparison reads or writes is damaged", PROMISE)
@fuzz_settings()
@given(job=json_bytes(JOB), tail=st.sampled_from([b"", b"\n", b"\n{"]), data=st.data())
def test_files_of_workers(tmp_path: Path, job: bytes, tail: bytes, data: st.DataObject) -> None:
    (tmp_path / "job.json").write_bytes(job)
    with promise():
        run_job(read_job(tmp_path / "job.json"))
    row = json.loads(not_run(get_method("snapkv"), 0.5, "why").model_dump_json())
    (tmp_path / "rows.jsonl").write_bytes(data.draw(json_bytes(row)) + tail)
    with promise():
        assert all(isinstance(row.level, float) for row in read_rows(tmp_path / "rows.jsonl"))


@pytest.mark.hazard("Parsers", "results in between of a calibration are damaged", "ignored, and measured again")
@fuzz_settings()
@given(text=json_bytes([[[0.1], dict.fromkeys(("requests", "ratio", "kl", "kl_upper", "kl_worst_request"), 1)]]))
def test_results_of_calibrations_in_between(text: bytes) -> None:
    try:
        found = dict(MEASURED.validate_json(text))
    except ValidationError:
        return
    assert all(isinstance(bound, float) for setting in found for bound in setting)


@pytest.mark.hazard("Parsers", "a wrong or hostile launch of the server", PROMISE)
@fuzz_settings()
@given(text=json_bytes(LAUNCH))
def test_launches(text: bytes) -> None:
    with promise():
        launch = Launch.from_json(text.decode("utf-8", "surrogateescape"))
        if launch.device != "auto":
            assert Launch.from_json(launch.to_json()) == launch and isinstance(launch.flags(), list)


@pytest.mark.parametrize("kind", ["closed", "poisson", "bursty", "replay"])
def test_a_load_without_its_numbers(kind: Any) -> None:
    """A result with a load of rate null passed as sound, and the report ended in a TypeError at the load's label."""
    with pytest.raises(ValueError, match=f"{kind} without"):
        Load(kind=kind)


def test_settings_of_a_benchmark_that_are_no_object(tmp_path: Path) -> None:
    """A settings.json holding a list raised AttributeError instead of naming the folder."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text("{}")
    (tmp_path / "settings.json").write_text("[1]")
    with pytest.raises(BadInput, match="no settings"):
        RunFolder(tmp_path, {})


@pytest.mark.parametrize("name", ["block_size", "block_bytes"])
def test_blocks_of_no_size(tmp_path: Path, name: str) -> None:
    """`jointkv report html` divided by a block size of 0."""
    (tmp_path / "result.json").write_text(json.dumps({**serving(), name: False}))
    with pytest.raises(BadInput, match=name):
        read_result(tmp_path / "result.json", [Serving])
