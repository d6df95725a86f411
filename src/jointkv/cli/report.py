"""`jointkv report`: pictures and tables from JSON results."""

from pathlib import Path

import typer

from jointkv.cli.console import named_errors, require, stderr_console


def plots(
    results: list[Path] = typer.Argument(..., metavar="RESULT.json...", help="Files that other verbs wrote."),
    output: Path = typer.Option(Path("out/plots"), help="Folder for the pictures and tables."),
) -> None:
    """Draw every picture that the results have something for, and write the same numbers as Markdown beside it.

    Files of one format are joined into one picture. Files of the same names in the folder are replaced.
    """
    with named_errors():
        require("matplotlib")
        from jointkv.report.pictures import make_pictures

        for path in make_pictures(results, output):
            stderr_console().print(f"wrote {path}", soft_wrap=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add the verb `report` to `app`."""
    group = typer.Typer(no_args_is_help=True, help="Pictures and tables from JSON results.")
    group.callback()(lambda: None)
    group.command()(plots)
    app.add_typer(group, name="report")
