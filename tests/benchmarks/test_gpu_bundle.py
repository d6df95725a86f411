"""GPU code of other chips is taken out of a program, and nothing else of it changes."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from gpu_bundle import BINARY, MAGIC, own, requirements, thinned, unpack, write

TEXT = 1


def entry(kind: int, target: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(code))
    return header + bytes(28 - len(header)) + struct.pack("<I", target) + b"h" * 32 + code


def container(*entries: bytes) -> bytes:
    content = b"".join(entries)
    return MAGIC + struct.pack("<HHQ", 1, 16, len(content)) + content


def test_machine_code_of_one_chip_stays() -> None:
    parts = (b"ordinary code", MAGIC, b" which is no container, and ")
    kept = container(entry(BINARY, 80, b"a" * 40), entry(BINARY, 90, b"b" * 40), entry(TEXT, 90, b"c" * 24))
    other = container(entry(BINARY, 120, b"d" * 8))
    expected = (
        kept.replace(b"a" * 40, bytes(40)).replace(b"c" * 24, bytes(24)) + b"end" + other.replace(b"d" * 8, bytes(8))
    )
    assert thinned(b"".join(parts) + kept + b"end" + other, 90) == b"".join(parts) + expected


def test_a_layout_that_is_not_known_is_refused() -> None:
    with pytest.raises(SystemExit, match="not laid out"):
        thinned(container(struct.pack("<HHIQ", BINARY, 0, 64, 10_000) + bytes(60)), 90)


def test_what_the_machine_has_and_what_no_dense_model_needs_is_left_out(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-1-py3-none-any.whl"
    told = ["msgspec", "numpy", "torch==2.13.0", "Lark==1.2.2", "flashinfer-python==0.7", 'boto3; extra == "s3"']
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("vllm-1.dist-info/METADATA", "\n".join(f"Requires-Dist: {one}" for one in told))
    found = requirements(wheel, {"numpy", "pytest", "rich"})
    assert found[:2] == ["msgspec", "Lark==1.2.2"] and "typer" in found and "pytest" not in found


def test_what_is_packed_is_unpacked(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write(bundle / "own.tar.xz", own())
    write(bundle / "more.tar.xz", {"package/part.py": b"part = 1"})
    unpack(bundle, tmp_path / "site")
    assert (tmp_path / "site/package/part.py").read_bytes() == b"part = 1"
    (ours,) = (tmp_path / "site").glob("jointkv-*.dist-info")
    assert "jointkv" in (ours / "entry_points.txt").read_text()
