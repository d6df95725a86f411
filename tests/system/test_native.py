"""A C file is compiled once per compiler, processor and headers, by any number of processes; failures are named."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jointkv.errors import NativeUnavailable
from jointkv.system import native

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """The folder of libraries, in which there is none yet."""
    monkeypatch.setenv("JOINTKV_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "native"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def compiler(folder: Path, script: str) -> str:
    """A compiler that tells what it defines and otherwise does as `script` says."""
    path = folder / "fake-cc"
    path.write_text(f'#!/bin/sh\ncase " $* " in *" -dM "*) echo 1; exit;; esac\n{script}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "script",
    ["echo broken >&2; exit 1", 'while [ "$1" != -o ]; do shift; done; echo no library > "$2"', "exit 0"],
    ids=["fails", "garbage", "nothing"],
)
def test_a_compiler_that_fails_is_named(source, fresh, monkeypatch, tmp_path, script):
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    with pytest.raises(NativeUnavailable):
        native.load(source)


def test_a_cache_folder_that_cannot_be_written_is_named(source, fresh):
    fresh.write_text("a file in its place")
    with pytest.raises(NativeUnavailable):
        native.load(source)


@needs_compiler
def test_a_compiler_without_openmp_will_do(source, fresh, monkeypatch, tmp_path):
    script = 'case " $* " in *" -fopenmp "*) exit 1;; esac; exec cc "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    assert native.load(source).answer() == 42


@needs_compiler
def test_another_processor_makes_another_library(source, fresh, monkeypatch, tmp_path):
    """One that has something more defines something more; its model may have the same name."""
    for number, defined in enumerate(("AVX2", "AVX512F", "AVX2")):
        script = f'case " $* " in *" -dM "*) echo {defined}; exit;; esac; exec cc "$@"'
        monkeypatch.setenv("CC", compiler(tmp_path, script))
        (tmp_path / "fake-cc").write_text(f"#!/bin/sh\n{script}\n")
        assert native.load(source).answer() == 42
        assert len(list(fresh.iterdir())) == min(number + 1, 2)


def building(source):
    """A process that builds and loads the kernel."""
    code = f"from pathlib import Path; from jointkv.system import native; native.load(Path({str(source)!r}))"
    return subprocess.Popen([sys.executable, "-c", code])


@needs_compiler
def test_a_library_is_built_once_and_again_where_it_is_damaged(source, fresh):
    assert building(source).wait(120) == 0
    (library,) = fresh.iterdir()
    built = library.stat()
    assert building(source).wait(120) == 0
    assert library.stat().st_mtime_ns == built.st_mtime_ns
    library.write_bytes(b"cut off")
    assert native.load(source).answer() == 42
    assert library.stat().st_size == built.st_size
    assert list(fresh.iterdir()) == [library]


@needs_compiler
def test_processes_may_build_at_once(source, fresh):
    running = [building(source) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert len(list(fresh.iterdir())) == 1
    assert native.load(source).answer() == 42
