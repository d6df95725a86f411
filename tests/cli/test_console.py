"""What all verbs share: help at once, errors in one line, JSON that replaces a file in one step."""

import json
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer import Exit

from jointkv import cli
from jointkv.cli import console, main
from jointkv.errors import BadInput
from jointkv.evaluate import traffic
from tests.cli.commands import run


def test_help_without_a_verb_and_version() -> None:
    code, out, _ = run()
    assert code == 0 and "model" in out
    assert run("--version") == (0, "jointkv 0.1.0\n", "")


def test_help_is_whole_on_a_terminal_of_80_columns() -> None:
    """Once sentences were cut, paragraphs broken in the middle of a line, and long words of options ended in dots."""
    for path, command in walk(typer.main.get_command(main.app)):
        code, out, _ = run(*path, "--help")
        assert code == 0 and not re.search(r"[a-z,:]\.\.\.$", out, re.MULTILINE), path
        assert max(map(len, out.splitlines())) <= 80, path
        for name in getattr(command, "commands", {}):
            assert f"\n  {name} " in out, (path, name)


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words, groups too."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


def test_a_full_disk_behind_the_output() -> None:
    """Once a traceback of a hundred lines."""
    words = [str(Path(sys.executable).parent / "jointkv"), "--version"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (2, "error: cannot write the output: No space left on device\n")


def test_where_a_result_is_to_go_is_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, why in ((tmp_path, "is a folder; name a file"), (tmp_path / "file" / "x.json", "a file where a folder")):
        for path, command in walk(typer.main.get_command(main.app)):
            if any("--json" in option.opts for option in command.params):
                code, out, err = run(*path, "--json", place)
                assert (code, out) == (2, "") and "--json" in err and why in " ".join(err.split()), path


def test_help_loads_no_heavy_library() -> None:
    code = "import sys, jointkv.cli.main; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_ctrl_c_while_the_command_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pressed(types.ModuleType):
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "jointkv.cli.main", Pressed("jointkv.cli.main"))
    with pytest.raises(SystemExit) as raised:
        cli.run()
    assert raised.value.code == 130


def test_the_installed_script_is_the_one_that_ends_well() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"jointkv": f"{cli.__name__}:{cli.run.__name__}"}


def test_ctrl_c_while_a_command_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def pressed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(traffic, "get_traffic", pressed)
    monkeypatch.setattr(sys, "argv", ["jointkv", "traffic", "near_prefix"])
    with pytest.raises(SystemExit) as raised:
        cli.run()
    assert raised.value.code == 130 and "Traceback" not in capsys.readouterr().err


def test_write_json_replaces_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    console.write_json(file, {"ratio": float("nan"), "at": tmp_path, "pair": (1, 2)})
    assert json.loads(file.read_text()) == {"ratio": None, "at": str(tmp_path), "pair": [1, 2]}
    with pytest.raises(ValueError, match="unknown type"):
        console.write_json(file, {"bad": object()})
    assert json.loads(file.read_text())["pair"] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_write_json_spares_devices_and_names_the_path(tmp_path: Path) -> None:
    console.write_json("/dev/null", {})
    assert Path("/dev/null").is_char_device()
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "result.json"):
        with pytest.raises(BadInput, match="cannot write"):
            console.write_json(place, {})


@pytest.mark.parametrize("width", [48, 60, 80, 200])
def test_no_number_of_a_table_is_cut(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once a KL of 0.00004 stood as "0.00…" on a terminal of 80 columns."""
    monkeypatch.setattr(console, "stdout_console", lambda columns: console.Console(width=width))
    numbers = [f"0.0000{number} ({number}.1234)" for number in range(6)]
    headings = ["traffic", "policy", *(f"KL, worst request {number}" for number in range(6)), "why"]
    console.print_table(
        "title", headings, [["near prefix", "safe", *numbers, "for a long reason"], ["names", "safe", "-"]]
    )
    out = capsys.readouterr().out
    assert "…" not in out and all(number in out for number in numbers) and "reason" in out
    assert max(map(len, out.splitlines())) <= width and out.count("title") == 1
    assert out.count("near prefix") == {48: 7, 60: 6, 80: 3, 200: 1}[width]


def test_fail_keeps_to_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exit) as raised, console.named_errors():
        raise BadInput("first [bold]line\n" + "and more " * 30)
    assert raised.value.exit_code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: first [bold]line and more") and err.count("\n") == 1


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), console.named_errors():
        _ = 1 / 0


def test_stages_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "stderr_console", lambda: console.Console(force_terminal=True, file=None))
    with console.stages("first") as show:
        show("second [with brackets]")
    assert isinstance(show, types.FunctionType)
