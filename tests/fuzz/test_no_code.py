"""Nothing in jointkv reads a format that can carry code, or hands text to an interpreter or a shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import jointkv

SOURCES = sorted(Path(jointkv.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "torch.jit"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "np.load", "numpy.load"}


def name_of(node: ast.expr) -> str:
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "?")


def findings(tree: ast.Module) -> list[str]:
    """What could run code that is not jointkv's, with line numbers."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{node.lineno}: import {name}" for name in names if name in MODULES]
        if isinstance(node, ast.Call):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            called = name_of(node.func)
            if called in CALLS or given.get("shell", "False") != "False":
                found.append(f"{node.lineno}: {called}")
            loads = called.endswith(".from_pretrained") and called.startswith("Auto")
            if loads and "gguf_file" not in given and given.get("trust_remote_code") != "False":
                found.append(f"{node.lineno}: {called} without trust_remote_code=False")
    return found


@pytest.mark.hazard(
    "Parsers", "a file that carries code", "no parser of jointkv runs any: no pickle, no eval, no shell"
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_source_runs_code_from_files(source: Path) -> None:
    assert findings(ast.parse(source.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "torch.load(path)",
        "subprocess.run(text, shell=True)",
        "AutoModelForCausalLM.from_pretrained(name)",
        "eval(text)",
    ],
)
def test_the_search_finds_it(line: str) -> None:
    assert findings(ast.parse(line))
