"""What a machine with a GPU, a Python with torch, and no internet lacks for `gpu_proof.py`, in files of some 50 MB.

`python benchmarks/gpu_bundle.py --has numpy,scipy,... --output out/gpu_bundle` where there is internet. There, in a
checkout, `python benchmarks/gpu_bundle.py --unpack out/gpu_bundle --output SITE`, then with `PYTHONPATH=SITE:src:.`
`python benchmarks/gpu_proof.py --keep-going --at-once 6`. vLLM's wheel is taken as it is but for kernels of other GPUs.
Its compiled parts ask for torch's stable interface alone: those of 0.32 find all that they ask for in torch 2.11.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
"""Begins a container of GPU code in a program; after 16 bytes its entries, each with a header of its own."""
BINARY = 2
"""Kind of an entry that is machine code."""

COMPILED = ("vllm/_C_stable_libtorch", "vllm/_moe_C_stable_libtorch", "vllm/vllm_flash_attn/_vllm_fa3_C")
"""What dense models in bfloat16 run of vLLM's compiled parts."""
LEFT_OUT = re.compile(r"\.(so|hpp|h|cuh)$|/vllm-rs$|/third_party/(deep_gemm|fmha_sm100)/|/data/.*\.(model|json)$")
PLATFORMS = ("manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
UNUSED = re.compile(
    "torch.*|nvidia-(?!ml).*|flashinfer.*|triton|tilelang|humming.*|quack.*|tokenspeed.*|fastsafetensors|instanttensor"
    "|pynvvideocodec|nvtx|cuda-.*|opencv.*|numba|llvmlite|ninja|opentelemetry-exporter-.*|cryptography|pycountry|sentry-sdk"
    "|fastar|rignore|httptools|fastapi-c.*"
)
"""Of vLLM's requirements: other kernels, video, and what only other ways to serve import."""
OWN = ("pydantic-settings", "typer", "rich", "psutil", "scipy", "zstandard", "hypothesis", "pytest", "pytest-timeout")


def thinned(program: bytes, arch: int) -> bytes:
    """`program` with zeros for GPU code that is not machine code of `arch` (90: Hopper); nothing moves."""
    found, place = bytearray(program), 0
    while (place := program.find(MAGIC, place)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", program, place + 4)
        entry = place + header
        if version != 1 or header != 16 or entry + size > len(program):
            place += len(MAGIC)
            continue
        place = entry + size
        while entry < place:
            kind, _, header, size = struct.unpack_from("<HHIQ", program, entry)
            (target,) = struct.unpack_from("<I", program, entry + 28)
            if not header or entry + header + size > place:
                raise SystemExit(f"GPU code at byte {entry} is not laid out as this program knows it")
            if (kind, target) != (BINARY, arch):
                found[entry + header : entry + header + size] = bytes(size)
            entry += header + size
    return bytes(found)


def vllms(wheel: Path, arch: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Files of the bundle's archives, by name."""
    with zipfile.ZipFile(wheel) as packed:
        names = [name for name in packed.namelist() if not LEFT_OUT.search(name)]
        yield "vllm", {name: packed.read(name) for name in names}
        for part in COMPILED:
            name = f"{part}.abi3.so"
            yield Path(part).name, {name: thinned(packed.read(name), arch)}


def requirements(wheel: Path, has: set[str]) -> list[str]:
    """vLLM's own and ours that neither the machine has nor a dense model needs."""
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        told = message_from_bytes(packed.read(name)).get_all("Requires-Dist") or []
    wanted = [line.split(";")[0].strip() for line in told if "extra ==" not in line]
    return [line for line in (*wanted, *OWN) if not unneeded(line, has)]


def unneeded(requirement: str, has: set[str]) -> bool:
    name = normal(re.split(r"[<>=!~\[ ]", requirement)[0])
    return name in has or UNUSED.fullmatch(name) is not None


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def packages(wheel: Path, python: str, has: set[str], folder: Path) -> dict[str, bytes]:
    """Files of what the wheel and we require, installed in `folder` for another Python, less what the machine has."""
    where = ["--target", str(folder), "--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    where += [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    chosen = requirements(wheel, has)
    heavy = [line for line in chosen if normal(line).startswith(("xgrammar", "compressed-tensors"))]  # bring torch
    subprocess.run([*pip, *where, "--no-deps", *heavy, "apache-tvm-ffi"], check=True)
    subprocess.run([*pip, *where, *(line for line in chosen if line not in heavy)], check=True)
    if shutil.which("strip"):
        subprocess.run(["strip", "--strip-debug", *folder.rglob("*.so")], check=False, stderr=subprocess.DEVNULL)
    found = {}
    for one in metadata.distributions(path=[str(folder)]):
        if unneeded(one.name, has):
            continue
        for file in one.files or []:
            if ".." not in file.parts and (folder / file).is_file() and not re.search(r"/data/|/tests?/", str(file)):
                found[str(file)] = (folder / file).read_bytes()
    return found


def own() -> dict[str, bytes]:
    """How vLLM finds jointkv."""
    ours = metadata.distribution("jointkv")
    folder = f"jointkv-{ours.version}.dist-info"
    return {f"{folder}/{name}": (ours.read_text(name) or "").encode() for name in ("METADATA", "entry_points.txt")}


def write(archive: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(archive, "w:xz") as target:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            target.addfile(entry, io.BytesIO(content))
    print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB", flush=True)


def unpack(bundle: Path, site: Path) -> None:
    def one(archive: Path) -> None:
        with tarfile.open(archive) as source:
            source.extractall(site, filter="data")

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, bundle.glob("*.tar.xz")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="version there")
    parser.add_argument("--vllm", default="0.32.0", help="version")
    parser.add_argument("--arch", type=int, default=90, help="compute capability there, times ten")
    parser.add_argument("--has", action="append", default=[], help="packages that are there beside torch")
    parser.add_argument("--unpack", type=Path, help="a bundle, into --output")
    parser.add_argument("--output", type=Path, default=Path("out/gpu_bundle"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.unpack:
        unpack(options.unpack, options.output)
        return
    has = {normal(name.strip()) for names in options.has for name in names.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        where = [word for platform in PLATFORMS for word in ("--platform", platform)]
        subprocess.run(
            [*pip, "--only-binary=:all:", *where, "--dest", folder, f"vllm=={options.vllm}"],
            check=True,
        )
        (wheel,) = Path(folder).glob("vllm-*.whl")
        write(options.output / "packages.tar.xz", packages(wheel, options.python, has, Path(folder) / "site") | own())
        for name, files in vllms(wheel, options.arch):
            write(options.output / f"{name}.tar.xz", files)


if __name__ == "__main__":
    main()
