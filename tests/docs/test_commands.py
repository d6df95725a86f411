"""Every command of README.md, CONTRIBUTING.md and docs/ runs here or says what it needs; its options exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from jointkv.cli.fusion_options import fusion_options
from jointkv.cli.main import app
from jointkv.errors import JointKVError
from jointkv.policy.profile import Target
from jointkv.vllm_plugin import WORKERS
from jointkv.vllm_plugin.settings import PluginSettings
from tests.docs.doc_pages import PAGES, ROOT, VLLM_FLAGS, Command, blocks, commands, inline_code, links

hooks = importlib.util.module_from_spec(
    importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / "docs" / "hooks.py")  # type: ignore[arg-type]
)
hooks.__spec__.loader.exec_module(hooks)  # type: ignore[union-attr]

SHELL = frozenset("|&;<>()$`*?#~\n")
"""What only a shell understands. Commands without it run in this process: every other one would import torch anew."""
ALL = [command for page in PAGES for command in commands(page)]


def run_here(command: Command) -> bool:
    """Whether nothing is needed beyond what CI has."""
    return not command.needs - {"prometheus"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository and takes what commands write."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("docs", "deploy", "benchmarks", "src", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.real_model
@pytest.mark.parametrize("text", dict.fromkeys(command.text for command in ALL if run_here(command)))
def test_runs(text: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(text)
    if words[0] == "promtool" and shutil.which("promtool") is None:
        pytest.skip("needs Debian's package prometheus")
    if words[0] == "jointkv" and words[1:] != ["--version"] and not SHELL.intersection(text):
        monkeypatch.chdir(desk)
        ended = CliRunner().invoke(app, words[1:])
        assert ended.exit_code == 0, f"{ended.output}\n{ended.exception!r}"
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    result = subprocess.run(
        ["bash", "-ec", text], cwd=desk, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_marks_are_known() -> None:
    for page in PAGES:
        for block in blocks(page):
            where = f"{page.name}:{block.line}"
            assert block.needs <= hooks.NEEDS.keys() and not block.unknown, f"{where}: {block.needs} {block.unknown}"
            assert block.language == "sh" or not block.needs, where
            assert block.language in ("sh", "python", "promql", "json", "text"), f"{where}: say what the block is"


def test_marks_are_shown_on_the_site() -> None:
    assert hooks.on_page_markdown("```sh needs=vllm,minutes\nx\n```\n").splitlines()[0] == (
        '```sh title="needs vLLM (make setup-vllm) and minutes"'
    )
    assert hooks.on_page_markdown("```sh\nneeds=vllm\n```\n") == "```sh\nneeds=vllm\n```\n"


@pytest.mark.parametrize("command", ALL, ids=str)
def test_exists(command: Command) -> None:
    """Every program, verb, option, make target and file in a command."""
    words = command.words
    while re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    checks = {"jointkv": check_jointkv, "make": check_make, "python": check_python, "vllm": check_vllm}
    checks |= {
        "pip": check_pip,
        "curl": check_curl,
        "promtool": check_last_is_there,
        "pytest": check_last_is_there,
        "cat": check_cat,
    }
    assert program in checks, f"no check for the program {program}"
    checks[program](arguments)


def verb(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command of click that `arguments` of `jointkv` lead to, and those left for it."""
    found: Any = typer.main.get_command(app)
    rest = list(arguments)
    while rest and rest[0] in getattr(found, "commands", {}):
        found = found.commands[rest.pop(0)]
    return found, rest


def check_jointkv(arguments: list[str]) -> None:
    found, rest = verb(arguments)
    if rest and rest[0] in ("--help", "--version"):
        return
    with found.make_context(found.name, list(rest)) as context:
        given = context.params
        extra = context.args
    assert all(not word.startswith("--") or word in VLLM_FLAGS for word in extra), extra
    if given.get("target"):
        Target.parse(given["target"])
    for name in ("fuse", "option"):
        fusion_options(given.get(name) or [], {}, name, "auto")


def check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert arguments and set(arguments) <= set(targets)


def check_pip(arguments: list[str]) -> None:
    """Extras exist, and what is taken away is what the Makefile takes away."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    action, *words = arguments
    names = [word for word in words if not word.startswith("-")]
    if action == "install":
        for name in names:
            package, _, extra = name.rstrip("]").partition("[")
            assert package == "jointkv" and (not extra or extra in project["optional-dependencies"])
    else:
        assert action == "uninstall" and " ".join(names) in (ROOT / "Makefile").read_text()


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        source, rest = importlib.util.find_spec(arguments[1]), arguments[2:]
        assert source is not None
        return
    text, rest = (ROOT / arguments[0]).read_text(), arguments[1:]
    for word in rest:
        assert not word.startswith("--") or f'"{word}"' in text, word


def check_vllm(arguments: list[str]) -> None:
    config = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    PluginSettings.parse(config["kv_connector_extra_config"])
    assert importlib.util.find_spec(config["kv_connector_module_path"]) is not None
    assert arguments[arguments.index("--worker-cls") + 1] in WORKERS.values()


def check_curl(arguments: list[str]) -> None:
    for option, value in itertools.pairwise(arguments):
        if option == "-d":
            json.loads(value)


def check_cat(arguments: list[str]) -> None:
    """What is joined was written by another command."""
    written = {word for command in ALL for option, word in itertools.pairwise(command.words) if option == "--output"}
    joined, to = arguments[: arguments.index(">")], arguments[arguments.index(">") :]
    assert len(to) == 2 and joined and set(joined) <= written


def check_last_is_there(arguments: list[str]) -> None:
    assert (ROOT / arguments[-1]).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_commands_and_options_exist(page: Path) -> None:
    known = (
        VLLM_FLAGS
        | {"--help"}
        | {option for command in verbs() for parameter in command.params for option in parameter.opts}
    )
    for code in inline_code(page):
        words = code.split()
        if words[0] == "jointkv" and len(words) > 1:
            found, rest = verb(words[1:])
            assert found.name != "jointkv" or rest[0].startswith("-"), f"no verb {code!r}"
            context = found.make_context(found.name, [], resilient_parsing=True)
            found.make_parser(context).parse_args(shlex.split(shlex.join(rest)))
        elif words[0].startswith("--"):
            assert words[0].partition("=")[0] in known, code
            if words[0] in ("--fuse", "--set") and words[1:] != ["KEY=VALUE"]:
                fusion_options(words[1:], {}, words[0], "auto")


def verbs() -> list[Any]:
    """All commands and groups of `jointkv`."""
    found, queue = [], [typer.main.get_command(app)]
    while queue:
        found.append(queue.pop())
        queue += getattr(found[-1], "commands", {}).values()
    return found


def test_every_verb_has_its_line() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()

    def walk(command: Any, path: tuple[str, ...]) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, (*path, name))
        if not getattr(command, "commands", {}):
            assert f"`{' '.join(path)}" in text, path

    walk(typer.main.get_command(app), ("jointkv",))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks(page: Path) -> None:
    """They compile, and what they import from jointkv is there."""
    for block in blocks(page):
        if block.language != "python":
            continue
        tree = ast.parse(block.text, f"{page.name}:{block.line}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jointkv"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path = target.partition("#")[0]
        assert not path or (page.parent / path).exists(), f"{page.name}: {target}"


def test_a_wrong_option_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        check_jointkv(["demo", "--no-such-option"])
    with pytest.raises(JointKVError):
        check_jointkv(["serve", "smollm2", "--fuse", "max_relativ_error=1"])
    with pytest.raises(AssertionError):
        check_jointkv(["serve", "smollm2", "--no-flag-of-vllm"])
