"""`jointkv store` lists, counts, verifies and cleans up, and says what is wrong with a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from jointkv.store import Store
from tests.cli.commands import run, run_json
from tests.store.records import record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Store(tmp_path / "store", segment_bytes=2000) as store:
        store.put(record(number) for number in range(50))
    return tmp_path / "store"


def test_ls_and_stat(folder: Path) -> None:
    segments = run_json("store", "ls", folder)["segments"]
    assert sum(segment["records"] for segment in segments) == 50 and len(segments) > 2
    found = run_json("store", "stat", folder)
    assert found["pages"] == 50 and found["segments"] == len(segments) and found["codecs"] == {"lossless": 50}
    assert found["bytes"] == sum(segment["nbytes"] for segment in segments)
    code, out, _ = run("store", "ls", folder)
    assert code == 0 and segments[0]["name"] in out and "closed" in out
    code, out, _ = run("store", "stat", folder)
    assert code == 0 and "50 pages (50 lossless)" in out


def test_verify_and_gc(folder: Path) -> None:
    assert run_json("store", "verify", folder)["sound"] is True
    path = next((folder / "segments").glob("*.data"))
    path.write_bytes(path.read_bytes()[:10] + b"x" + path.read_bytes()[11:])
    code, out, err = run("store", "verify", folder)
    assert code == 2 and f"{path.stem}:0" in out and "gc" in err
    done = run_json("store", "gc", folder, "--max-bytes", "5000")
    assert done["freed_bytes"] > 0
    assert run_json("store", "verify", folder)["sound"] is True
    assert run_json("store", "stat", folder)["bytes"] <= 5000
    assert run("store", "gc", folder)[0] == 0


@pytest.mark.parametrize("verb", ["ls", "stat", "verify", "gc"])
def test_no_store(tmp_path: Path, verb: str) -> None:
    for path in (tmp_path, tmp_path / "none"):
        code, _, err = run("store", verb, path)
        assert code == 2 and "not a store of pages" in err
    assert list(tmp_path.iterdir()) == []


def test_a_secret_beside_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "secret").rename(tmp_path / "secret")
    code, _, err = run("store", "verify", folder)
    assert code == 2 and "secret is not in it" in err
    assert run_json("store", "verify", folder, "--secret", tmp_path / "secret")["sound"] is True
    code, _, err = run("store", "verify", folder, "--secret", tmp_path / "none")
    assert code == 2 and f"cannot read the secret {tmp_path / 'none'}: No such file or directory" in err
