"""The command `jointkv`: one file of this package per verb; those with verbs of their own have `register(app)`."""

import typer

import jointkv
from jointkv.cli import bench, evaluate, model, report, store
from jointkv.cli.advise import advise
from jointkv.cli.calibrate import calibrate
from jointkv.cli.demo import demo
from jointkv.cli.doctor import doctor
from jointkv.cli.generate import generate
from jointkv.cli.inspect import inspect
from jointkv.cli.serve import SETTINGS, serve
from jointkv.cli.traffic import traffic

# Without rich's boxes, which cut what is too long for a narrow terminal and break paragraphs where the source does.
app = typer.Typer(name="jointkv", add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode=None)


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


for verb in (advise, calibrate, demo, doctor, generate, inspect, traffic):
    app.command()(verb)
app.command(**SETTINGS)(serve)
for group in (bench, evaluate, model, report, store):
    group.register(app)
