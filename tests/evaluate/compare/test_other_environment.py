"""Methods run in another process, as in another environment."""

import subprocess
import sys
import time

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.compare import other_environment as worker
from jointkv.evaluate.compare.comparison import run_methods
from jointkv.evaluate.compare.other_environment import Job, compare_methods, main, read_job, run_job
from jointkv.evaluate.methods import get_method
from jointkv.evaluate.methods.minicache import MiniCache
from tests.evaluate.methods.tiny_batches import batch_of, different


class Elsewhere(MiniCache):
    """Missing here; the worker knows the name."""

    packages = ("no-such-distribution",)


class Nobody(Elsewhere):
    name = "known_to_nobody"


@pytest.fixture
def saved(tmp_path):
    batch = batch_of(different(rows=2))
    batch.model.save_pretrained(tmp_path)
    return batch, tmp_path


def test_rows_come_back_from_the_worker_in_the_order_wanted(saved):
    batch, folder = saved
    wanted = [(Elsewhere(), 0.75), (get_method("unfused"), 1.0), (Elsewhere(), 0.5)]
    lines = []
    rows = compare_methods(
        batch,
        wanted,
        model_folder=folder,
        worker_python=sys.executable,
        traffic="different",
        generate=2,
        progress=lines.append,
    )
    assert [(row.method, row.level, row.not_run) for row in rows] == [
        ("minicache", 0.75, None),
        ("unfused", 1.0, None),
        ("minicache", 0.5, None),
    ]
    (here,) = run_methods(batch, [(MiniCache(), 0.75)], generate=2, traffic="different")
    assert rows[0].nbytes == here.nbytes and rows[0].outputs == here.outputs
    assert rows[0].kl == pytest.approx(here.kl, rel=1e-3) and rows[0].traffic == "different"
    assert lines.count("unfused reference") == 2 and "minicache at 0.5" in lines


def test_a_missing_environment_is_said_in_every_row(saved, tmp_path):
    batch, folder = saved
    for python in (None, tmp_path / "nowhere"):
        rows = compare_methods(batch, [(Elsewhere(), 0.5)], model_folder=folder, worker_python=python)
        assert rows[0].not_run.endswith("run: make setup-eval") and rows[0].kl is None


def test_a_worker_that_fails_is_said_in_every_row(saved):
    batch, folder = saved
    wanted = [(Nobody(), 0.5), (Elsewhere(), 0.5)]
    rows = compare_methods(batch, wanted, model_folder=folder, worker_python=sys.executable)
    assert len(rows) == 2
    for row in rows:
        assert "exit code 1" in row.not_run and "unknown method 'known_to_nobody'" in row.not_run


def test_rows_made_before_a_worker_died_are_kept(saved, tmp_path):
    batch, folder = saved
    # An interpreter whose worker dies at the second method, as under a kernel short of memory.
    python = tmp_path / "python"
    code = "import os, sys, jointkv.evaluate.compare.other_environment as w; run = w.run_job; sys.argv[1:3] = []; "
    code += "w.run_job = lambda *a, **k: (os._exit(9) if i else row for i, row in enumerate(run(*a, **k))); "
    code += "w.main(sys.argv[1:])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    python.chmod(0o755)
    wanted = [(Elsewhere(), 0.5), (Elsewhere(), 0.75), (Elsewhere(), 0.25)]
    rows = compare_methods(batch, wanted, model_folder=folder, worker_python=python)
    assert [row.level for row in rows] == [0.5, 0.75, 0.25]
    assert rows[0].not_run is None and rows[0].kl > 0
    assert all("exit code 9" in row.not_run for row in rows[1:])


def script_of(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def is_running(pid):
    return subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout[:1] not in ("", "Z")


def test_a_worker_that_cannot_be_started_loses_no_row(saved, tmp_path):
    batch, folder = saved
    python = tmp_path / "python"
    python.write_text("not a program")
    wanted = [(Elsewhere(), 0.5), (MiniCache(), 0.5)]
    rows = compare_methods(batch, wanted, model_folder=folder, worker_python=python)
    assert "could not be started" in rows[0].not_run and "Permission denied" in rows[0].not_run
    assert rows[1].not_run is None and rows[1].kl > 0


def test_a_silent_worker_is_ended_with_all_that_it_started(saved, tmp_path):
    batch, folder = saved
    python = script_of(tmp_path / "python", f"sleep 600 & echo $! > {tmp_path / 'pid'}; echo started; wait")
    lines, start = [], time.perf_counter()
    rows = compare_methods(
        *(batch, [(Elsewhere(), 0.5)]),
        **{"model_folder": folder, "worker_python": python, "progress": lines.append, "silence_seconds": 2.0},
    )
    assert rows[0].not_run == "the worker was ended after 2 s without output" and lines == ["started"]
    assert time.perf_counter() - start < 60 and not is_running((tmp_path / "pid").read_text().strip())


def test_an_interrupt_ends_the_worker(saved, tmp_path):
    batch, folder = saved
    python = script_of(tmp_path / "python", f"echo $$ > {tmp_path / 'pid'}; echo started; exec sleep 600")

    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_methods(batch, [(Elsewhere(), 0.5)], model_folder=folder, worker_python=python, progress=interrupt)
    assert not is_running((tmp_path / "pid").read_text().strip())


def test_the_prefill_is_released_before_the_worker_starts(saved, monkeypatch):
    batch, folder = saved
    seen = []
    monkeypatch.setattr(worker, "run_elsewhere", lambda job, wanted, *_: seen.append(set(vars(batch))) or [None])
    compare_methods(batch, [(Elsewhere(), 0.5), (MiniCache(), 0.5)], model_folder=folder)
    assert seen == [{"model", "requests", "block_size"}]


def test_a_job_holds_everything_in_json(saved):
    batch, folder = saved
    job = Job.of(batch, [(get_method("semantic"), 0.9)], folder, generate=1)
    (row,) = run_job(Job.model_validate_json(job.model_dump_json()))
    assert (row.method, row.level, row.generated, row.requests) == ("semantic", 0.9, 1, 2)
    assert job.dtype == "float32" and len(job.requests) == 2


def test_another_format_is_refused(tmp_path):
    (tmp_path / "job.json").write_text('{"format": "other/2"}')
    with pytest.raises(BadInput, match=r"format: Input should be 'jointkv.methods.job/1'"):
        read_job(tmp_path / "job.json")


def test_a_model_that_is_not_there_is_bad_input(saved):
    """The worker ended with a traceback of transformers."""
    batch, _ = saved
    job = Job.of(batch, [(get_method("semantic"), 0.9)], "/nowhere", generate=1)
    with pytest.raises(BadInput, match="cannot load the model /nowhere"):
        run_job(job)


def test_usage(capsys):
    assert main([]) == 2
    assert "JOB.json RESULT.jsonl" in capsys.readouterr().err
