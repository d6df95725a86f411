"""A full disk leaves every file as it was, and the error names the file and the reason."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from jointkv.errors import BadInput
from jointkv.evaluate.holding import prefilled
from jointkv.evaluate.holding.prefilled import Prefilled
from jointkv.evaluate.predict.similarity import ERROR_BOUNDS, Similarity
from jointkv.report.pictures.similarity import draw_similarity
from jointkv.system.files import make_folder, replace_text, replacing
from tests.core.profiles import make_profile

FULL = pytest.mark.hazard(
    "Faults",
    "a full disk where a profile or a result is written",
    "the file is as it was, nothing half written is left, and one line names the file and the reason",
)


@contextmanager
def full_disk(room: int = 16) -> Iterator[None]:
    """No file of this process can grow beyond `room` bytes; the system says so in the middle of writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_prefilled(path: Path) -> None:
    prefilled.save(Prefilled([], {"key.0": torch.zeros(8, 8)}, 8, torch.ones(1, 8), 1.0), path)


def write_heat_map(path: Path) -> None:
    row = Similarity(0, "key", "across", 4, *(5 * [0.5]), tuple(0.5 for _ in ERROR_BOUNDS))
    draw_similarity([row], path, "title")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: replace_text(path, "x" * 4096),
    "profile": lambda path: make_profile().save(path),
    "prefilled batch": write_prefilled,
    "heat map": write_heat_map,
}


@FULL
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk(tmp_path: Path, writer: str) -> None:
    write, path = WRITERS[writer], tmp_path / "result"
    write(tmp_path / "imports what it needs")
    path.write_text("precious")
    with full_disk(), pytest.raises(BadInput) as refused:
        write(path)
    assert str(path) in str(refused.value) and "File too large" in str(refused.value)
    assert path.read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["imports what it needs", "result"]
    write(path)
    assert path.read_bytes() != b"precious" and len(list(tmp_path.iterdir())) == 2


@FULL
def test_a_device_that_is_full() -> None:
    with pytest.raises(BadInput, match=r"cannot write /dev/full: No space left on device"):
        replace_text("/dev/full", "text")


@FULL
def test_several_files_at_once_are_all_old_or_all_new(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("old")
    with full_disk(), pytest.raises(BadInput, match="File too large"), ExitStack() as files:
        for name, text in (("a", "new"), ("b", "new" * 99)):
            files.enter_context(replacing(tmp_path / name)).write_text(text)
    assert [file.read_text() for file in sorted(tmp_path.iterdir())] == ["old", "old"]


def test_a_link_stays_a_link_and_folders_are_made(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    replace_text(tmp_path / "some" / "where" / "file", "new")
    assert (tmp_path / "some" / "where" / "file").read_text() == "new"


@pytest.mark.parametrize("name", ["file/below", "folder", "nul\0", "~nobody-of-that-name/x"])
def test_what_is_no_place_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(BadInput, match="cannot write"):
        replace_text(name, "text")
    if name != "folder":
        with pytest.raises(BadInput, match="cannot make the folder"):
            make_folder(Path(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_error_of_the_writer_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file") as file:
        file.write_text("half")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.hazard(
    "Faults",
    "SIGTERM while a result is written",
    "exit code 143, the file is as it was, nothing half written is left",
)
def test_a_signal_in_the_middle_of_writing(tmp_path: Path) -> None:
    """Ended by the signal's default, a command once left its temporary file behind."""
    path = tmp_path / "result"
    path.write_text("precious")
    program = f"""
import time
from jointkv.cli.console import named_errors
from jointkv.system.files import replacing
with named_errors(), replacing({str(path)!r}) as file:
    file.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 2
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 10
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]
