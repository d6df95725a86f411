"""The command `jointkv`: one verb per file of this package, each with a function `register(app)`."""

import typer

import jointkv
from jointkv.cli import bench, calibrate, demo, doctor, evaluate, generate, inspect, model, report, serve

VERBS = (bench, calibrate, demo, doctor, evaluate, generate, inspect, model, report, serve)

app = typer.Typer(name="jointkv", add_completion=False, pretty_exceptions_show_locals=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    """Joint encoding of KV-cache blocks: more LLM conversations in the same KV-cache memory."""
    if version:
        typer.echo(f"jointkv {jointkv.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for verb in VERBS:
    verb.register(app)
