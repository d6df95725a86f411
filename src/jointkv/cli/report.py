"""`jointkv report`: pictures, tables and a page from JSON results."""

from pathlib import Path

import typer

from jointkv.cli.console import named_errors, require, stderr_console
from jointkv.system.files import replace_text


def plots(
    results: list[Path] = typer.Argument(..., metavar="RESULT.json...", help="Files that other verbs wrote."),
    only: list[str] | None = typer.Option(None, metavar="PICTURE", help="This picture alone; may be repeated."),
    output: Path = typer.Option(Path("out/plots"), help="Folder for the pictures and tables."),
) -> None:
    """Draw pictures of results, with the same numbers as Markdown.

    Every picture is drawn that the results have something for. Files of one format are joined into one picture. Files
    of the same names in the folder are replaced.
    """
    with named_errors():
        require("matplotlib")
        from jointkv.report.pictures import make_pictures

        for path in make_pictures(results, output, only or ()):
            _wrote(path)


def html(
    results: list[Path] = typer.Argument(..., metavar="RESULT.json...", help="Files that `jointkv bench serve` wrote."),
    output: Path = typer.Option(Path("report.html"), "--output", "-o", help="The page."),
) -> None:
    """Write one page on results of `jointkv bench serve`.

    Verdict, tables, charts and break-even; it needs no network. Several files, of other traffics, pools or loads, are
    set side by side; those of another model or machine are kept apart.
    """
    with named_errors():
        require("matplotlib")
        from jointkv.report.serving.page import write_page

        write_page(results, output)
        _wrote(output)


def terminal(
    result: Path = typer.Argument(..., metavar="RESULT.json", help="File that `jointkv demo` wrote."),
    command: str = typer.Option("jointkv demo", help="The command that the picture shows as given."),
    output: Path = typer.Option(Path("demo.svg"), "--output", "-o", help="The picture."),
) -> None:
    """Draw what `jointkv demo` shows in a terminal, as an SVG."""
    with named_errors():
        require("matplotlib")
        from jointkv.evaluate.compare.result import Demo
        from jointkv.report.pictures.demo import markdown
        from jointkv.report.results import read_result
        from jointkv.report.terminal import recording

        replace_text(output, recording(command, markdown(read_result(result, (Demo,)).rows)))
        _wrote(output)


def _wrote(path: Path) -> None:
    stderr_console().print(f"wrote {path}", soft_wrap=True, highlight=False, markup=False)


def register(app: typer.Typer) -> None:
    """Add the verb `report` to `app`."""
    group = typer.Typer(no_args_is_help=True, help="Pictures, tables and a page from JSON results.")
    group.callback()(lambda: None)
    group.command()(plots)
    group.command()(html)
    group.command()(terminal)
    app.add_typer(group, name="report")
