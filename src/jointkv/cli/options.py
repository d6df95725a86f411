"""Options that several verbs share, each declared once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from jointkv.errors import BadInput
from jointkv.system.files import make_room


class ReuseOption(StrEnum):
    """Whether resident text is read before it is computed: never, with a licence from audits, or by evidence alone."""

    OFF = "off"
    LICENSED = "licensed"
    PROBED = "probed"


Model = Annotated[str, typer.Option(help="Known name, local folder or hub name.")]
FORMATS = (
    "JSONL or a JSON array of objects with prompt, messages (OpenAI's, with tools) or conversations (ShareGPT's); .txt "
    "with a prompt on each line; .parquet; hub:OWNER/NAME[:CONFIG][:SPLIT]."
)
"""What holds requests of a user, as every verb reads it."""

Data = Annotated[Path | None, typer.Option(help=f"Your requests, else built-in traffic. {FORMATS}")]
ScoredTokens = Annotated[int, typer.Option(min=1, help="True tokens scored after each prompt.")]
ChunkTokens = Annotated[int, typer.Option(min=1, help="Tokens per chunk of a request.")]
BlockSize = Annotated[int, typer.Option(min=1, help="Tokens per KV block.")]
Dtype = Annotated[str, typer.Option(help="Of the model and its KV cache.")]
SEEDS: dict[str, Any] = {"min": 0, "max": 2**32 - 1}
"""What every generator of random numbers takes."""

Seed = Annotated[int, typer.Option(help="Seed of the requests.", **SEEDS)]


def _room_for(path: str | None) -> str | None:
    """`path`, before anything takes long that is to be written there. Raises `typer.BadParameter`."""
    try:
        if path not in (None, "-"):
            make_room(Path(path))
    except BadInput as error:
        raise typer.BadParameter(str(error)) from None
    return path


Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - means stdout.", callback=_room_for),
]
Reuse = Annotated[
    ReuseOption, typer.Option(help="Read resident text instead of computing it: with a licence from audits, or probed.")
]
